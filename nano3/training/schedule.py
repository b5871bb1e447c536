"""The schedules of `nano3/training/rates.py` as NeMo takes them.

NeMo's `CosineAnnealingScheduler` is not used: its default of 80,000 constant steps gives every parameter group the rate
of the first, its `min_lr` is one number for all groups, and neither keeps the ratio of rates that LoRA+ sets between A
and B. Megatron-Core's scheduler counts samples and is not a PyTorch scheduler, which Lightning wants.
"""

from __future__ import annotations

from typing import Any

from nemo.lightning.pytorch.optim.base import LRSchedulerModule

from nano3.training.rates import factor, group_rates


class Schedule(LRSchedulerModule):
    """Arguments as in `nano3.training.rates.factor`."""

    def __init__(self, kind: str, steps: int, warmup: int, decay: int, floor: float) -> None:
        super().__init__()
        self.kind, self.steps, self.warmup, self.decay, self.floor = kind, steps, warmup, decay, floor

    def factor(self, step: int) -> float:
        """The rate of `step` as a multiple of the peak."""
        return factor(step, self.kind, self.steps, self.warmup, self.decay, self.floor)

    def scheduler(self, model: Any, optimizers: Any) -> dict[str, Any]:
        """What Lightning's `configure_optimizers` returns; one scheduler step an optimizer step."""
        del model
        rates = group_rates(optimizers, self.factor)
        return {"optimizer": optimizers, "lr_scheduler": {"scheduler": rates, "interval": "step", "frequency": 1}}
