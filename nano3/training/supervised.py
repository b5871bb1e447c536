"""Tells the rank's supervising thread how the training gets on, and gives every process group the same patience."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state

from nano3.training import supervision


class Supervision(pl.Callback):
    """Marks steps and validations for `nano3.training.supervision`, which the worker has started.

    Args:
        stuck_minutes: a collective may take half as long again: the thread, which names ranks, comes first.
    """

    def __init__(self, stuck_minutes: float) -> None:
        self.patience = timedelta(minutes=1.5 * stuck_minutes)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Process groups exist, with limits of NeMo's and Megatron-Core's; they get ours."""
        del trainer, pl_module, stage
        parallel_state.update_pg_timeout(self.patience)
        supervisor = supervision.running()
        if supervisor is not None:
            supervisor.peers = f"stage {parallel_state.get_pipeline_model_parallel_rank()}"

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        del pl_module
        tell_supervisor(f"step {trainer.global_step + 1}")
        supervisor = supervision.running()
        if supervisor is not None:
            supervisor.work.begin()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        del pl_module
        tell_supervisor(f"what follows step {trainer.global_step}")
        supervisor = supervision.running()
        if supervisor is not None:
            supervisor.work.end()

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        del pl_module
        tell_supervisor(f"the validation after step {trainer.global_step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del trainer, pl_module
        tell_supervisor("the end of the training")


def tell_supervisor(place: str) -> None:
    """Says where this rank is, so that it does not count as stuck; nothing where no supervisor runs."""
    supervisor = supervision.running()
    if supervisor is not None:
        supervisor.at(place)
