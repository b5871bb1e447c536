"""The learning rate of every step: warm-up, then cosine, warmup-stable-decay (WSD) or constant. No NeMo."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def factor(step: int, kind: str, steps: int, warmup: int, decay: int, floor: float) -> float:
    """The rate of `step`, counted from 0, as a multiple of the peak.

    Warm-up, for `step` < `warmup`: (step + 1) / (warmup + 1), so that the first step already learns. After it:
      * cosine: from 1 at `warmup` to `floor` at `steps`, the step after the last;
      * wsd: 1, and over the last `decay` steps floor + (1 - floor) * (1 - sqrt(p)), p the share of the decay that is
        over. Shape and source: Hägele et al. 2024 (arXiv 2405.18392), where 1 - sqrt beats linear;
      * constant: 1.

    Args:
        step: optimizer steps already taken.
        kind: cosine, wsd or constant.
        steps: of the whole run.
        warmup: steps of the warm-up.
        decay: steps of the decay; wsd only.
        floor: lowest rate over the peak; cosine and wsd.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    if kind == "wsd":
        part = min(max((step - (steps - decay)) / decay, 0.0), 1.0)
        shape = 1 - math.sqrt(part)
    else:
        shape = 0.5 * (1 + math.cos(math.pi * min((step - warmup) / (steps - warmup), 1.0)))
    return floor + (1 - floor) * shape


class GroupRates(LambdaLR):
    """Every parameter group at its own peak times `factor`.

    Its state is the step alone: which groups a rank has, and in which order, depends on the parallel layout.
    """

    def state_dict(self) -> dict[str, Any]:
        """How many steps have been taken."""
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets step and the groups' rates at once."""
        self.last_epoch, self._step_count = state_dict["step"], state_dict["step"] + 1
        peaks = zip(self.base_lrs, self.lr_lambdas, strict=True)
        self._last_lr = [peak * factor_of(self.last_epoch) for peak, factor_of in peaks]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def group_rates(optimizer: Any, factor_of: Callable[[int], float]) -> GroupRates:
    """The scheduler of `optimizer`.

    The peak of a parameter group is its `max_lr` (Megatron-Core puts it there: `OptimizerConfig.lr`, or what an
    override of the group says), so that a group with twice the peak has twice the rate in every step,
    the floor included.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = group.get("max_lr", group["lr"])
    return GroupRates(optimizer, factor_of)
