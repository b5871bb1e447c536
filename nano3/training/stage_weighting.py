"""Gives the model the weights of the stages, and keeps them over a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from nano3.cli import UserError
from nano3.stage_weights import UNTIL, StageWeights


class StageWeighting(pl.Callback):
    """Weighs the stages of turns in the training loss; the validation loss stays that of the data.

    Args:
        fixed: weights of stages 1 to 5.
        exponent: of dynamic weights; 0: they stay as given.
    """

    def __init__(self, fixed: Sequence[float], exponent: float) -> None:
        self.weights = StageWeights(fixed, exponent)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the model is made: it judges its training tokens only where somebody asks."""
        del trainer, stage
        pl_module.stage_weights = self.weights  # type: ignore[assignment]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Refuses data without stages: their weights would change nothing, and nobody would notice."""
        if self.weights.step == min(UNTIL, trainer.max_steps) and not self.weights.seen:
            raise UserError(
                f"no token of the first {self.weights.step} steps has a stage from 1 to 5, so stages.weights changes "
                "nothing; give the data 'spans' with stages (docs/step_aware.md), or set stages.weights=uniform"
            )

    def state_dict(self) -> dict[str, Any]:
        return self.weights.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights.restore(state_dict)
