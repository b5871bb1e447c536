"""What a run does for the sweep that it is a trial of: it tells every validation loss, and ends when it is given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from finetune.sweep.study import Study


class Pruning(pl.Callback):
    """Rank 0 writes into the sweep's journal; all ranks end by what it read there.

    Args:
        folder: of the sweep.
        number: of this run's trial.
    """

    def __init__(self, folder: str, number: int) -> None:
        self.folder, self.number = Path(folder), number

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        ended = torch.zeros(1, dtype=torch.int32).cuda()
        if trainer.is_global_zero:
            step, loss = trainer.global_step, float(trainer.callback_metrics["validation_loss"])
            ended += Study.read(self.folder).gives_up(self.number, step, loss, step >= trainer.max_steps)
            if ended:
                print(f"step {step}: the sweep gives trial {self.number} up: others were better by now", flush=True)
        dist.broadcast(ended, src=0)
        if ended:
            trainer.should_stop = True
