"""Out of memory ends with what to change, not with an allocator's table."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from nano3.cli import UserError

CPU_WORDS = ("can't allocate memory", "not enough memory")
"""What PyTorch's CPU allocator says in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_WORDS)


class MemoryAdvice(pl.Callback):
    """Turns an out-of-memory error into a `UserError` with remedies. Must be the last callback: no other has a turn
    after it.

    Args:
        remedies: what to change, with the present values.
    """

    def __init__(self, remedies: str) -> None:
        self.remedies = remedies

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        del pl_module
        if is_out_of_memory(exception):
            reason = str(exception).strip().splitlines()
            raise UserError(
                f"out of memory on rank {trainer.global_rank} in step {trainer.global_step + 1}: {self.remedies}. "
                f"({reason[0] if reason else type(exception).__name__})"
            ) from exception
