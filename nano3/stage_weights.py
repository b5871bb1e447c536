"""The weight of each stage of a turn in the loss: given, or moved by what the model gets wrong.

A label's stage is a byte of the token store: 0 none, 1 to 5 the parts of a step-aware trace and its answer, 6 and above
other uses, whose weight is 1 like that of none. Dynamic weights follow a table over all ranks, equal on all of them:

    e_s = moving mean (0.9) of the share of stage s's supervised tokens that are not predicted right
    f_s = moving mean (0.9) of stage s's share of the supervised tokens that have a stage
    w_s = clip(((e_s + 0.01) / sum_j f_j (e_j + 0.01)) ** exponent, 1/4, 4), scaled so that sum_s f_s w_s = 1

For the first 20 steps they are 1. No gradient goes through them. The formula is our own; no public one was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import MaxLen, MinLen
from typing_extensions import TypedDict

from nano3.documents import Count, NotNegative, check
from nano3.pickles import REMEDY

NAMES = ("none", "understand", "plan", "execute", "verify", "answer", "other")
"""Stages by number; the last stands for all above."""
KEPT = 0.9
"""Share of a moving mean that the next step keeps."""
FLOOR = 0.01
"""Added to a share of wrong tokens: a stage without any keeps some weight."""
LEAST, MOST = 0.25, 4.0
UNTIL = 20
"""Steps in which dynamic weights are 1."""


Stages = Annotated[list[NotNegative], MinLen(len(NAMES)), MaxLen(len(NAMES))]


class StageState(TypedDict):
    """What a checkpoint holds of the weights."""

    weights: Stages
    errors: Stages
    shares: Stages
    step: Count
    seen: bool


class StageWeights:
    """Weights by stage, (7,) float64, in the order of `NAMES`.

    Args:
        fixed: the weights of stages 1 to 5, with which dynamic ones are multiplied.
        exponent: of dynamic weights; 0: they never move.
    """

    def __init__(self, fixed: Sequence[float], exponent: float) -> None:
        self.exponent = exponent
        self.fixed = torch.tensor([1.0, *fixed, 1.0], dtype=torch.float64)
        self.weights = self.fixed.clone()
        self.errors = torch.zeros(len(NAMES), dtype=torch.float64)
        self.shares = torch.zeros(len(NAMES), dtype=torch.float64)
        self.step = 0
        self.seen = False

    @property
    def dynamic(self) -> bool:
        """Whether the weights move, for which training must know which tokens are predicted right."""
        return self.exponent > 0

    def update(self, tokens: torch.Tensor, right: torch.Tensor) -> None:
        """The weights of the next step.

        Args:
            tokens: supervised tokens of each stage in this step, of all ranks, (7,).
            right: how many of them were predicted right.
        """
        self.step += 1
        tokens, right = tokens.double().cpu(), right.double().cpu()
        staged = tokens.clone()
        staged[[0, -1]] = 0
        self.seen = self.seen or bool(staged.sum() > 0)
        if not self.dynamic or staged.sum() == 0:
            return
        seen, new = staged > 0, self.shares == 0
        wrong = 1 - right / tokens.clamp(min=1)
        moved = torch.where(new, wrong, KEPT * self.errors + (1 - KEPT) * wrong)
        self.errors = torch.where(seen, moved, self.errors)
        share = staged / staged.sum()
        first = self.shares.sum() == 0
        self.shares = share if first else KEPT * self.shares + (1 - KEPT) * share
        if self.step >= UNTIL:
            self.weights = self.fixed * self._moved()

    def _moved(self) -> torch.Tensor:
        """Dynamic weights (7,): of stages that were seen, whose mean over their tokens is 1; else 1."""
        known = self.shares > 0
        shares = self.shares / self.shares.sum()
        relative = (self.errors + FLOOR) / (shares * (self.errors + FLOOR)).sum()
        weights = (relative**self.exponent).clamp(LEAST, MOST)
        weights = weights / (shares * weights).sum()
        return torch.where(known, weights, torch.ones_like(weights))

    def state(self) -> dict[str, Any]:
        """What a run that resumes must know."""
        lists = {name: getattr(self, name).tolist() for name in ("weights", "errors", "shares")}
        return {**lists, "step": self.step, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises `UserError` for what is none."""
        check(state, StageState, "the checkpoint's weights of stages", REMEDY)
        for name in ("weights", "errors", "shares"):
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))
        self.step, self.seen = state["step"], state["seen"]
