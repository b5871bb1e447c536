"""Dropout on an adapter's input, which must agree between tensor-parallel ranks exactly where the input is the same.

Megatron-Core keeps several generators per rank. PyTorch's own is the same on all tensor-parallel ranks as long as all
of them draw the same numbers from it: it is for inputs that every rank has whole. Inputs of which each rank has a part
draw from the tensor-parallel one, and routed experts, whose number of tokens is every rank's own, from the experts'.
"""

from __future__ import annotations

from typing import Literal

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from torch import nn

Input = Literal["whole", "part", "experts"]
"""What a rank has of an adapter's input: all of it, a part of its features or positions, or its experts' tokens."""


class InputDropout(nn.Dropout):
    """`nn.Dropout` for an input of which this rank has `share`."""

    def __init__(self, p: float, share: Input) -> None:
        super().__init__(p)
        self.share = share

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Same shape; random numbers are drawn only where there is something to drop."""
        if not self.training or self.p == 0 or self.share == "whole":
            return super().forward(input)
        tracker = get_cuda_rng_tracker()
        experts = self.share == "experts"
        with tracker.fork(get_expert_parallel_rng_tracker_name()) if experts else tracker.fork():
            return super().forward(input)
