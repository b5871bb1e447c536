"""Adapters that never learn stop the run by name, instead of finishing as the base model.

A target can be wrapped and yet be dead: outside the graph, cut off by a detach, missing from the optimizer. B starts at
zero, so in the first step only B can receive a gradient; once B has moved, A must receive one too.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from nano3.cli import UserError

STEPS_OF_GRACE = 3
"""By the end of this step every A must have had a gradient."""


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable adapter matrices of this rank by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".adapter." in name and parameter.requires_grad
    }


class AdapterLiveness(pl.Callback):
    """Checks that every B had a gradient and is non-zero after step 1, and that every A had a gradient by step 3."""

    def __init__(self) -> None:
        self.alive: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def _watch(self, name: str) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            self.alive[name] |= gradient.detach().count_nonzero() > 0

        return hook

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._hooks or trainer.global_step:
            return
        for name, parameter in adapter_parameters(pl_module).items():
            self.alive[name] = torch.zeros((), dtype=torch.bool, device=parameter.device)
            self._hooks.append(parameter.register_hook(self._watch(name)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not self._hooks:
            return
        step, parameters = trainer.global_step, adapter_parameters(pl_module)
        if step == 1:
            outs = {name: value for name, value in parameters.items() if ".linear_out." in name}
            moved = {name: self.alive[name] & (value.detach().count_nonzero() > 0) for name, value in outs.items()}
            self._require(outs, moved, step)
        if step == STEPS_OF_GRACE:
            self._require(parameters, self.alive, step)
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def _require(self, parameters: dict[str, nn.Parameter], alive: dict[str, torch.Tensor], step: int) -> None:
        """Every matrix must be alive on at least one of the ranks that hold a part of it."""
        flags = torch.stack([alive[name].float() for name in parameters]) if parameters else torch.zeros(0)
        dead = [name for name, flag in zip(parameters, _anywhere(flags).tolist(), strict=True) if not flag]
        if dead:
            names = ", ".join(name.split("decoder.", 1)[-1] for name in dead[:5])
            raise UserError(
                f"after step {step} {len(dead)} of {len(parameters)} adapter matrices have learned nothing: {names}; "
                "the run would end as the base model. Leave these targets out (lora.targets), or report this as a bug"
            )


def _anywhere(flags: torch.Tensor) -> torch.Tensor:
    """Flags (n,) of this rank -> 1 where any rank with the same layers has 1: all but the other pipeline stages."""
    from megatron.core import parallel_state

    for group in (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    ):
        if dist.get_world_size(group) > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return flags
