"""Validation decides two things: which adapter was the best so far, and when there is no point in going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import TypedDict

from nano3.checkpoints.adapter_checkpoint import adapter_facts, save_trained
from nano3.documents import Count, check
from nano3.pickles import REMEDY


class ValidationState(TypedDict):
    """What a checkpoint holds of it; losses are infinite before the first validation."""

    best: float
    best_step: Count
    reference: float
    waited: Count


class Validation(pl.Callback):
    """Keeps the adapter of the best validation, and stops a run that no longer improves.

    Args:
        out: folder of the best adapter.
        patience: validations in a row without an improvement after which the run stops; 0: it never does.
        min_improvement: by how much the loss must fall below that of the last improvement to be one.
    """

    def __init__(self, out: str, patience: int, min_improvement: float) -> None:
        self.out, self.patience, self.min_improvement = Path(out), patience, min_improvement
        self.best = self.reference = float("inf")
        self.best_step = self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know: the best loss and its step, and how long it has not improved."""
        return {name: getattr(self, name) for name in ValidationState.__annotations__}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises `UserError` for what is none."""
        check(state_dict, ValidationState, "the checkpoint's state of validation", REMEDY)
        for name in ValidationState.__annotations__:
            setattr(self, name, state_dict[name])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = _of_rank_0(trainer.callback_metrics["validation_loss"])
        step, say = trainer.global_step, trainer.is_global_zero
        if loss < self.best:
            self.best, self.best_step = loss, step
            facts = {
                "validation_loss": loss,
                "validation_accuracy": float(trainer.callback_metrics["validation_accuracy"]),
            }
            save_trained(trainer, pl_module, self.out, {**adapter_facts(trainer), **facts})
            if say:
                print(f"step {step}: the best validation so far, kept in {self.out}", flush=True)
        if loss < self.reference - self.min_improvement:
            self.reference, self.waited = loss, 0
        else:
            self.waited += 1
        if self.patience and self.waited >= self.patience:
            trainer.should_stop = True
            if say:
                print(self._verdict(step), flush=True)

    def _verdict(self, step: int) -> str:
        limit = self.reference - self.min_improvement
        return (
            f"stopped after step {step}: no validation loss below {limit:.4f} in {self.waited} validations "
            f"(train.patience); the best was {self.best:.4f} at step {self.best_step}, kept in {self.out}"
        )


def _of_rank_0(value: torch.Tensor) -> float:
    """The value that rank 0 has: ranks that decide by it decide alike."""
    agreed = torch.as_tensor(value, dtype=torch.float64).detach().clone().cuda()
    dist.broadcast(agreed, src=0)
    return float(agreed)
