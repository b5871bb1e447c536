"""A process on the CPU backend that says what becomes of Adam's step and of random numbers: `... OUT.json`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import random  # noqa: E402

from nano3.checkpoints import training_state  # noqa: E402
from nano3.lora.dropout import Input, InputDropout  # noqa: E402


class GroupAdam(torch.optim.Optimizer):
    """Counts as Transformer Engine's fused Adam does: once for a group, and not at all before the first step."""

    def __init__(self, parameters: list) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def stepped(make: Callable, steps: int) -> Any:
    """An optimizer after so many steps, as `nano3.checkpoints.training_state` sees it."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = make(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optimizer.step()
    return SimpleNamespace(inner=optimizer, holders=lambda: iter(parameters))


def adam_steps(make: Callable) -> dict[str, Any]:
    """The step of a rank without an optimizer, of one, after it was set to 3, and of two that differ."""
    training_state.optimizer_states = lambda trainer: trainer  # type: ignore[assignment, return-value]
    fresh: Any = [stepped(make, 0)]
    training_state.set_adam_step(fresh, 3)
    different: Any = [stepped(make, 3), stepped(make, 2)]
    try:
        refused = f"{training_state.adam_step(different)}"
    except AssertionError as error:
        refused = str(error)
    taken: Any = [stepped(make, 3)]
    none: Any = []
    return {
        "none": training_state.adam_step(none),
        "taken": training_state.adam_step(taken),
        "set": training_state.adam_step(fresh),
        "different": refused,
    }


def draws(seed: int, step: int, rank: int, ep_rank: int = 0) -> list[list[float]]:
    """What a rank of TP2 and ETP2 drops: an input that all have whole, a part of one; experts' tokens, a part of them.

    64 numbers each: where kept 1 / 0.5 and else 0.
    """
    for name, value in (("tensor_model", rank), ("expert_model", ep_rank), ("expert_tensor", rank)):
        setattr(random, f"get_{name}_parallel_rank", lambda value=value: value)
    parallel_state.get_expert_tensor_parallel_world_size = lambda: 2
    parallel_state.get_expert_model_parallel_rank = lambda: ep_rank
    training_state.new_random_state(seed, step)
    shares: tuple[Input, ...] = ("whole", "part", "experts", "expert slices")
    return [InputDropout(0.5, share)(torch.ones(64)).tolist() for share in shares]


def main() -> None:
    asked = {"first": (1234, 8, 0), "again": (1234, 8, 0), "other rank": (1234, 8, 1)}
    asked |= {"other step": (1234, 9, 0), "other seed": (1235, 8, 0)}
    draws(1234, 8, 5, 16)  # of TP8, ETP8 and EP32, where a seed of ours has met one of Megatron-Core's, who refuses it
    result = {
        "by parameter": adam_steps(torch.optim.AdamW),
        "by group": adam_steps(GroupAdam),
        "draws": {name: draws(*arguments) for name, arguments in asked.items()},
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
