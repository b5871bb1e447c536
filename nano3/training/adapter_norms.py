"""How far every adapter has moved its layer: the Frobenius norm of scale * B @ A, without forming it.

    |B A|^2 = trace((B^T B) (A A^T)),

two rank x rank matrices. Each rank has either whole rows of B and all of A, or all of B and some columns of A, so the
squares of tensor-parallel ranks add up, and of routed experts those of expert-tensor-parallel ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from nano3.lora.adapter_walk import Adapted, adapted_layers
from nano3.training.expert_load import over_stages

TOTAL = "adapter_norm"


@torch.no_grad()
def squared_norm(layer: Adapted) -> torch.Tensor:
    """|scale * B A|^2 of this rank's part, FP64 (): of an adapter that experts share once, else over local experts."""
    parts = layer.adapter.parts(layer.base)
    if layer.routed and not _each(layer):
        parts = parts[:1]
    total = torch.zeros((), dtype=torch.float64, device=parts[0][1].device)
    for _, low, high in parts:
        low, high = low.double(), high.double()
        total += ((high.T @ high) * (low @ low.T)).sum()
    return total * layer.adapter.scale**2


def adapter_norms(model: nn.Module) -> dict[str, float]:
    """`adapter_norm/PATH` of every adapted layer of the model, and `adapter_norm`, the root of the sum of squares.

    Of routed experts with an adapter each, the root of the sum over all experts. All ranks must call it.
    """
    layers = list(adapted_layers(model))
    squares = [squared_norm(layer) for layer in layers]
    dense = [number for number, layer in enumerate(layers) if not layer.routed]
    each = [number for number, layer in enumerate(layers) if layer.routed and _each(layer)]
    shared = [number for number, layer in enumerate(layers) if layer.routed and not _each(layer)]
    _sum_over(squares, dense, parallel_state.get_tensor_model_parallel_group())
    _sum_over(squares, each, parallel_state.get_expert_tensor_and_model_parallel_group())
    _sum_over(squares, shared, parallel_state.get_expert_tensor_parallel_group())
    values = torch.stack(squares).tolist() if squares else []
    whole = over_stages(dict(zip((layer.path for layer in layers), values, strict=True)))
    norms = {f"{TOTAL}/{path}": square**0.5 for path, square in whole.items()}
    return {**norms, TOTAL: sum(whole.values()) ** 0.5}


def _each(layer: Adapted) -> bool:
    """Whether the layer's experts have an adapter each."""
    return hasattr(layer.adapter.linear_in, "weight0")


def _sum_over(squares: list[torch.Tensor], chosen: list[int], group: dist.ProcessGroup) -> None:
    if chosen and dist.get_world_size(group) > 1:
        together = torch.stack([squares[number] for number in chosen])
        dist.all_reduce(together, group=group)
        for number, value in zip(chosen, together, strict=True):
            squares[number] = value
