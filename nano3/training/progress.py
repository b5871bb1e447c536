"""What a run shows: one readable line now and then, and a row of metrics every step (docs/tracking.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl

from nano3.cli import UserError
from nano3.training.divergence import Divergence
from nano3.training.journal import Journal, Row, View

TIMED_STEPS = 2
"""Steps from which the time of the run is told; the first step of a process compiles and is left out."""
FORWARDED = ("loss/", "router_", "stage_")
"""Beginnings of metrics that others log every step; those of validation begin with `validation_`."""


def line(
    step: int, steps: int, loss: float, lr: float, grad_norm: float, tokens_per_second: float, left: float | None
) -> str:
    """`step 12/300  loss 1.2345  lr 1.00e-03  grad norm 0.512  2345 tokens/s  3m20s left`; or no time."""
    time_left = ""
    if left is not None:
        minutes, seconds = divmod(int(left), 60)
        time_left = f"  {minutes}m{seconds:02d}s left"
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {loss:.4f}  lr {lr:.2e}  grad norm {grad_norm:.3f}  "
        f"{tokens_per_second:.0f} tokens/s{time_left}"
    )


def expected(seconds: Sequence[float], left: int) -> str:
    """How long the steps that are left take, from the first that were timed."""
    mean = sum(seconds) / len(seconds)
    minutes = mean * left / 60
    time_left = (
        f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min" if minutes >= 2 else f"{60 * minutes:.0f} s"
    )
    return f"time        about {time_left} for {left} steps, from {mean:.2f} s a step in the first ones"


def logged(trainer: pl.Trainer, *beginnings: str) -> Row:
    """What callbacks and model have logged under names with one of these beginnings; what is no number is left out."""
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(beginnings)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


class Details(Protocol):
    """Metrics of a step that need all ranks (`nano3.training.step_metrics`)."""

    def start(self, model: pl.LightningModule) -> None:
        """Before the step."""

    def stop(self, model: pl.LightningModule) -> Row:
        """After it; all ranks call it."""


class Progress(pl.Callback):
    """Prints every `every` steps, writes every step and every validation, and stops a run that diverges.

    Args:
        folder: of the run: `metrics.jsonl` goes there.
        every: steps between printed lines; so often, and after the first and the last step, a row has the norms of all
            adapters, the load of the experts and the memory.
        steps: of the whole run.
        flops: of a step, from the lengths of its documents in tokens.
        divergence: multiple of its lowest level above which the loss may not stay; 0: any (`divergence.py`).
        details: of the rows that have them.
        views: what shows the rows besides `metrics.jsonl`.
    """

    def __init__(
        self,
        folder: str,
        every: int,
        steps: int,
        flops: Callable[[Sequence[int]], float],
        divergence: float,
        details: Details,
        views: Sequence[View] = (),
    ) -> None:
        self.every, self.steps, self.flops, self.details = every, steps, flops, details
        self.journal, self.divergence = Journal(Path(folder), views), Divergence(divergence)
        self.began = self.lr = 0.0
        self.spent: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """What the judgement of divergence needs over a restart."""
        return {"divergence": self.divergence.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.divergence.load_state_dict(state_dict["divergence"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del pl_module
        if trainer.is_global_zero:
            self.journal.open(trainer.global_step)

    def _in_detail(self, step: int) -> bool:
        return step == 1 or step % self.every == 0 or step == self.steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # The rate now, since after the step the scheduler has moved on.
        self.lr = float(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])
        if self._in_detail(trainer.global_step + 1):
            self.details.start(pl_module)
        self.began = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        del outputs, batch, batch_idx
        step, metrics = trainer.global_step, trainer.callback_metrics
        loss, norm = float(metrics["reduced_train_loss"]), float(metrics.get("grad_norm", float("nan")))
        seconds = time.monotonic() - self.began  # after the loss has arrived, hence after the step's work on a GPU
        details = self.details.stop(pl_module) if self._in_detail(step) else {}
        if not trainer.is_global_zero:
            return
        self.divergence.check(step, loss, norm, self.lr)
        row = {"loss": loss, "lr": self.lr, "grad_norm": norm, **self._speed(trainer, step, seconds)}
        row.update(logged(trainer, *FORWARDED), **details)
        self._write(step, row)
        self.spent.append(seconds)
        if len(self.spent) == TIMED_STEPS + 1 and step < self.steps:
            print(expected(self.spent[1:], self.steps - step), flush=True)
        if self._in_detail(step):
            later = self.spent[1:]  # the first step of a process also compiles
            left = sum(later) / len(later) * (self.steps - step) if later else None
            print(line(step, self.steps, loss, self.lr, norm, row["tokens_per_second"], left), flush=True)

    def _speed(self, trainer: pl.Trainer, step: int, seconds: float) -> Row:
        data = trainer.datamodule  # type: ignore[attr-defined]
        documents = data.documents_in_step(step - 1)
        tokens, ranks = sum(documents), trainer.world_size
        return {
            "tokens": tokens,
            "padding_share": 1 - tokens / (data.global_batch_size * data.seq_length),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / ranks,
            "tflops_per_gpu": self.flops(documents) / seconds / ranks / 1e12,
        }

    def _write(self, step: int, row: Row) -> None:
        self.journal.write({"step": step, "time": time.time(), **row})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del pl_module
        row, step = logged(trainer, "validation_"), trainer.global_step
        if "validation_loss" not in row:  # not a number, on all ranks alike
            raise UserError(
                f"step {step}: the validation loss is not a number: the run diverged; lower train.lr or train.clip, or "
                "lengthen train.warmup, and resume from a checkpoint before it or start over with --overwrite"
            )
        if trainer.is_global_zero:
            self._write(step, row)
            print(f"step {step}/{self.steps}  validation loss {row['validation_loss']:.4f}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del pl_module
        if trainer.is_global_zero:
            self.journal.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        del pl_module, exception
        if trainer.is_global_zero:
            self.journal.close()
