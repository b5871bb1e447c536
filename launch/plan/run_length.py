"""How long a run is: here alone passes over the data become optimizer steps. Imports neither torch nor NeMo."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launch.plan.plan_settings import TrainPlan
from nano3.cli import UserError
from nano3.mixture import DataSize
from nano3.ranges import MOST_STEPS

DEFAULT_EPOCHS = 3.0
"""Passes over the data when neither `train.steps` nor `train.epochs` is given: the field's habit for fine-tuning
(transformers' `num_train_epochs` is 3). It follows the data: a number of steps that is right for one set is a fraction
of a pass, or tens of passes, over another."""
MANY_PASSES = 5.0
"""Above so many passes a run is warned: a small set is then mostly learned by heart."""
FEW_STEPS = 20
"""Below so many steps a run is warned: there is hardly time to warm up."""


@dataclass(frozen=True)
class RunLength:
    """A run over a store, in numbers."""

    rows: int
    """Documents in the packs."""
    packs: int
    global_batch: int
    """Packs of a step."""
    steps: int
    derived: bool = False
    """Whether the steps follow from passes over the data."""

    @property
    def passes(self) -> float:
        """How often every pack is seen."""
        return self.steps * self.global_batch / self.packs

    def describe(self) -> list[str]:
        """Rows, packs, passes and steps, and a warning where they look like a mistake."""
        one = f"{self.rows:,} rows in {self.packs:,} packs; a step takes {self.global_batch}"
        lines = [f"data        {one}", f"length      {self.steps:,} steps, {self.passes:.2f} passes over the data"]
        if self.passes > MANY_PASSES:
            lines.append(
                f"warning     {self.passes:.1f} passes: above {MANY_PASSES:g} a set is mostly learned by heart. "
                f"{self._fewer_passes()}"
            )
        elif self.derived and self.steps < FEW_STEPS:
            lines.append(f"warning     only {self.steps} steps: lower train.global_batch for more, or give more data")
        return lines

    def _fewer_passes(self) -> str:
        """What brings the passes down to the usual number."""
        steps = int(DEFAULT_EPOCHS * self.packs / self.global_batch)
        if steps >= FEW_STEPS:
            return f"train.steps={steps} makes {DEFAULT_EPOCHS:g}"
        return "Give more data, or lower train.global_batch and train.steps"


def steps_of(train: TrainPlan, packs: int) -> int:
    """The optimizer steps of a run over so many packs: `train.steps`, or the fewest that make its passes."""
    if train.steps is not None:
        return train.steps
    epochs = DEFAULT_EPOCHS if train.epochs is None else train.epochs
    return min(MOST_STEPS, max(1, math.ceil(epochs * packs / train.global_batch)))


def length_of(train: TrainPlan, size: DataSize, data: str) -> RunLength:
    """The length of a run over data of that size; a mixture that says epochs itself is met once as it says.

    Raises `UserError` where such a mixture and `train.epochs` both say how often; `data` is how it is called.
    """
    if size.by_epochs and train.steps is None:
        if train.epochs is not None:
            raise UserError(f"{data} says epochs of its stores: leave train.epochs={train.epochs:g} out")
        train = replace(train, epochs=1.0)
    steps = steps_of(train, size.packs)
    return RunLength(size.rows, size.packs, train.global_batch, steps, derived=train.steps is None)
