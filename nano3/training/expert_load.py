"""How many tokens of a global batch each routed expert received, and the memory that ranks hold."""

from __future__ import annotations

import resource
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from nano3 import cpu
from nano3.router import routers


class ExpertLoad:
    """Counts the routers' choices in forward passes that train.

    A recomputed router runs twice, the first time without gradients: only runs with gradients count, which leaves one
    of the two, and none of a validation. (Megatron-Core counts for its bias update by the same rule.)
    """

    def __init__(self) -> None:
        self.counts: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def start(self, model: nn.Module) -> None:
        """Counts from zero until `stop`."""
        self.counts = {}
        for number, router in routers(model).items():
            self.counts[number] = torch.zeros_like(router.expert_bias, dtype=torch.int64)
            self._hooks.append(router.register_forward_hook(self._count(number)))

    def _count(self, number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if torch.is_grad_enabled():
                self.counts[number] += output[1].detach().sum(0)

        return hook

    def stop(self) -> dict[int, list[int]]:
        """Tokens of each expert in the global batch, padding too, of every layer; all ranks must call it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.counts:  # tokens are spread over data-, context- and, with sequence parallel, tensor-parallel ranks
            together = torch.stack(list(self.counts.values()))
            dist.all_reduce(
                together, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            )
            mine = dict(zip(self.counts, together.tolist(), strict=True))
        else:
            mine = {}
        return over_stages(mine)


def over_stages(mine: dict[Any, Any]) -> dict[Any, Any]:
    """What the pipeline stages hold, together, in the order of the stages; all ranks must call it."""
    group = parallel_state.get_pipeline_model_parallel_group()
    parts: list[dict[Any, Any]] = [mine]
    if dist.get_world_size(group) > 1:
        parts = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(parts, mine, group=group)
    return {key: value for part in parts for key, value in part.items()}


def load_metrics(counts: dict[int, list[int]]) -> dict[str, Any]:
    """Metrics of `ExpertLoad.stop`: the counts, and how uneven they are (max over mean; 1 is even)."""
    metrics: dict[str, Any] = {}
    for number, load in counts.items():
        metrics[f"expert_load/{number}"] = load
        metrics[f"expert_imbalance/{number}"] = max(load) * len(load) / max(sum(load), 1)
        metrics[f"experts_idle/{number}"] = load.count(0) / len(load)
    if counts:
        metrics["expert_imbalance"] = max(metrics[f"expert_imbalance/{number}"] for number in counts)
    return metrics


def peak_memory_gb() -> float:
    """Peak memory of the rank that needs most, in 10^9 bytes: of its GPU's tensors; of its process on CPU ranks.

    All ranks must call it.
    """
    held = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if cpu.enabled()
        else torch.cuda.max_memory_allocated()
    )
    peak = torch.tensor([held], dtype=torch.float64).cuda()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return float(peak) / 1e9
