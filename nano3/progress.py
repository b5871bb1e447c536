"""One readable line a step, and the same numbers in `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nano3.cli import UserError


def line(step: int, steps: int, loss: float, lr: float, grad_norm: float, tokens_per_second: float, left: float) -> str:
    """`step 12/300  loss 1.2345  lr 1.00e-03  grad norm 0.512  2345 tokens/s  3m20s left`."""
    minutes, seconds = divmod(int(left), 60)
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {loss:.4f}  lr {lr:.2e}  grad norm {grad_norm:.3f}  "
        f"{tokens_per_second:.0f} tokens/s  {minutes}m{seconds:02d}s left"
    )


class Progress(pl.Callback):
    """Prints every `every` steps and writes every step, a validation's loss among them.

    Args:
        folder: where `metrics.jsonl` goes; one object a step with step, loss, lr, grad_norm, tokens, seconds, and
            validation_loss objects when a validation has run.
        every: steps between printed lines.
        steps: of the whole run.
    """

    def __init__(self, folder: str, every: int, steps: int) -> None:
        self.folder, self.every, self.steps = Path(folder), every, steps
        self.started = self.last = self.lr = 0.0

    def _write(self, **numbers: Any) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(numbers) + "\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del pl_module
        self.started = self.last = time.monotonic()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # Now, since after the step the scheduler has moved on.
        self.lr = float(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        del pl_module, outputs, batch, batch_idx
        if not trainer.is_global_zero:
            return
        step, now, metrics = trainer.global_step, time.monotonic(), trainer.callback_metrics
        loss, norm = float(metrics["reduced_train_loss"]), float(metrics.get("grad_norm", float("nan")))
        tokens = trainer.datamodule.tokens_in_step(step - 1)  # type: ignore[attr-defined]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {norm} at lr {self.lr:.2e}: the run diverged and nothing is "
                "saved; lower train.lr or train.clip, or lengthen train.warmup"
            )
        self._write(step=step, loss=loss, lr=self.lr, grad_norm=norm, tokens=tokens, seconds=now - self.last)
        if step == 1 or step % self.every == 0 or step == self.steps:
            left = (now - self.started) / step * (self.steps - step)
            print(line(step, self.steps, loss, self.lr, norm, tokens / (now - self.last), left), flush=True)
        self.last = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del pl_module
        if trainer.is_global_zero and "validation_loss" in trainer.callback_metrics and not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["validation_loss"])
            self._write(step=trainer.global_step, validation_loss=loss)
            print(f"step {trainer.global_step}/{self.steps}  validation loss {loss:.4f}", flush=True)
        self.last = time.monotonic()
