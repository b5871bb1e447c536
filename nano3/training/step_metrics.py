"""What some rows of metrics have besides: norms of the adapters, load of the experts, memory."""

from __future__ import annotations

from torch import nn

from nano3.training.adapter_norms import adapter_norms
from nano3.training.expert_load import ExpertLoad, load_metrics, peak_memory_gb
from nano3.training.journal import Row


class StepDetails:
    """Watches one step; all ranks must call both methods."""

    def __init__(self) -> None:
        self.experts = ExpertLoad()

    def start(self, model: nn.Module) -> None:
        """Before the step."""
        self.experts.start(model)

    def stop(self, model: nn.Module) -> Row:
        """After the step."""
        return {**adapter_norms(model), **load_metrics(self.experts.stop()), "memory_gb": peak_memory_gb()}
