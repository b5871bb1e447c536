"""Run by tests/nano3/test_liveness.py: three steps of a tiny model with a fault each, and what liveness says.

python -m tests.helpers.liveness_probe OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

from nano3.arch import Arch  # noqa: E402
from nano3.cli import UserError  # noqa: E402
from nano3.lora.adapter_walk import adapted_layers  # noqa: E402
from nano3.lora.liveness import AdapterLiveness  # noqa: E402
from nano3.lora.lora import Nano3LoRA  # noqa: E402
from nano3.targets import PRESETS, select  # noqa: E402
from nano3.training.expert_load import ExpertLoad  # noqa: E402
from tests.helpers.mcore_model import build, join_alone  # noqa: E402
from tests.helpers.tiny import TINY_CONFIG  # noqa: E402

ROUTED = "decoder.layers.1.mlp.experts.linear_fc1"
TOKENS = 3
"""Few, so that some of the 8 experts have none."""

Model = torch.nn.Module


def tiny(experts: str) -> Model:
    model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)
    arch = Arch.from_config(TINY_CONFIG)
    model = build(arch, TOKENS, torch.float32)
    lora = Nano3LoRA(modules=select(arch, PRESETS["all"], experts), rank=4, alpha=8.0, experts=experts)
    return lora(model).train()


def layer(model: Model, path: str) -> Any:
    return next(found for found in adapted_layers(model) if found.path == path)


def detach_expert(number: int) -> Callable[[Model], None]:
    """The delta of one expert outside the graph."""

    def fault(model: Model) -> None:
        adapter = layer(model, ROUTED).adapter
        forward = adapter.forward

        def detached(x: torch.Tensor, splits: Any) -> torch.Tensor:
            parts = list(forward(x, splits).split(list(splits)))
            parts[number] = parts[number].detach()
            return torch.cat(parts)

        adapter.forward = detached

    return fault


def cut_off(model: Model) -> None:
    """No gradient reaches the experts at all."""
    experts = layer(model, ROUTED).wrapper
    experts.register_forward_hook(lambda _m, _i, out: (out[0].detach(), out[1]))


def three_steps(
    experts: str,
    fault: Callable[[Model], None] | None = None,
    frozen: str = "",
    first: int = 0,
    supervised: int = TOKENS,
) -> dict[str, Any]:
    """Trains from step `first` to 3.

    Parameters whose name ends with `frozen` are missing from the optimizer; the first `supervised` tokens have a loss.
    """
    model, guard, load = tiny(experts), AdapterLiveness(), ExpertLoad()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for n, p in trained.items() if not frozen or not n.endswith(frozen)], lr=1e-3)
    for step in range(4):
        if step == first:
            if fault is not None:
                fault(model)  # a run that goes on has learned before
            load.start(model)
        if step >= 3:
            break
        if step >= first:
            guard.on_train_batch_start(SimpleNamespace(global_step=step), model)
        tokens = torch.arange(TOKENS)[None] + 7
        model(tokens, torch.arange(TOKENS)[None], None, labels=tokens + 1)[:, :supervised].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= first:
            try:
                guard.on_train_batch_end(SimpleNamespace(global_step=step + 1), model)
            except UserError as error:
                return {"stopped": str(error)}
    loads = load.stop()
    return {"stopped": None, "load": loads[1], "last": loads[4], "watching": len(guard._handles)}


def main() -> None:
    join_alone()
    healthy = three_steps("each")
    busy = max(range(8), key=healthy["load"].__getitem__)
    idle = healthy["load"].index(0)
    proj = "layers.3.self_attention.linear_proj.adapter.linear_in.weight"
    results = {
        "busy": busy,
        "healthy": healthy,
        "shared": three_steps("shared"),
        "idle expert detached": three_steps("each", detach_expert(idle)),
        "busy expert detached": three_steps("each", detach_expert(busy)),
        "experts cut off": three_steps("each", cut_off),
        "not in the optimizer": three_steps("each", None, frozen=proj),
        "resumed after 2": three_steps("each", first=2),
        "resumed after 2, detached": three_steps("each", detach_expert(busy), first=2),
        "resumed after 3": three_steps("each", first=3),
        "one token supervised": three_steps("each", supervised=1),
    }
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
