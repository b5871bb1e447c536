"""When a run has gone wrong beyond repair: a loss that stays far above what it was."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Annotated, Any

from annotated_types import MaxLen
from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import Count, check
from nano3.pickles import REMEDY

PATIENCE = 20
"""Steps in a row that must be bad: one hard batch, or a spike from which the optimizer recovers, is no divergence."""

SMOOTH = 5
"""Steps whose median counts as a level of the loss."""

DIVERGED = "the run diverged"
"""In the message of every run that ends here, and of no other."""


class DivergenceState(TypedDict):
    """What a checkpoint holds of it; levels are infinite in the first steps."""

    bad: Count
    first: float
    lowest: float
    recent: Annotated[list[float], MaxLen(SMOOTH)]


class Divergence:
    """Stops a run whose loss is no number, or stays above both `ratio` times its lowest level and its first level.

    A level is the median of 5 steps. The first level is the base model's (B starts at zero), so the second condition
    spares runs that have learned a task by heart and wobble around a tiny loss.

    Args:
        ratio: of the loss to its lowest level; 0 never stops a run whose loss is a number.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio, self.bad = ratio, 0
        self.first = self.lowest = math.inf
        self.recent: deque[float] = deque(maxlen=SMOOTH)

    def check(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """Takes note of a step. Raises `UserError` when the run has diverged."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {grad_norm} at lr {lr:.2e}: {DIVERGED}; "
                "lower train.lr or train.clip, or lengthen train.warmup"
            )
        limit = max(self.first, self.ratio * self.lowest)
        self.bad = self.bad + 1 if self.ratio and loss > limit else 0
        if self.bad >= PATIENCE:
            raise UserError(
                f"step {step}: the loss is {loss:.4f}, for {PATIENCE} steps above {limit:.4f} (it began at "
                f"{self.first:.4f} and had come down to {self.lowest:.4f}) at lr {lr:.2e}: {DIVERGED}; lower "
                "train.lr or train.clip, lengthen train.warmup, or raise train.divergence if this is to be expected"
            )
        self.recent.append(loss)
        if len(self.recent) == SMOOTH:
            level = median(self.recent)
            self.first = level if self.first == math.inf else self.first
            self.lowest = min(self.lowest, level)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run judges as the uninterrupted one."""
        return {"bad": self.bad, "first": self.first, "lowest": self.lowest, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises `UserError` for what is none."""
        check(state, DivergenceState, "the checkpoint's levels of the loss", REMEDY)
        self.bad, self.first, self.lowest = state["bad"], state["first"], state["lowest"]
        self.recent = deque(state["recent"], maxlen=SMOOTH)
