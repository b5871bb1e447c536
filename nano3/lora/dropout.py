"""Dropout on an adapter's input, which must agree between tensor-parallel ranks exactly where the input is the same.

Megatron-Core keeps several generators per rank. PyTorch's own is the same on all tensor-parallel ranks as long as all
of them draw the same numbers from it: it is for inputs that every rank has whole. Inputs of which each rank has a part
draw from the tensor-parallel one, and routed experts, whose number of tokens is every rank's own, from the experts'.
That one differs between the ranks that hold slices of the same experts; what these have in common, fc1's input, draws
from one that we add.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
    model_parallel_cuda_manual_seed,
)
from torch import nn

Input = Literal["whole", "part", "experts", "expert slices"]
"""What a rank has of an adapter's input: all of it, a part of its features or positions, its experts' tokens, or a
part of their features."""
_SLICED_EXPERTS = "experts-whole-input"
_OFFSET, _EXPERTS_APART = 1 << 20, 100
"""Megatron-Core's generators start at the seed + 2718 + (TP rank) and, the experts', at the seed + 1024 + 100 * (EP
rank) + (ETP rank); it refuses a second one with the same start. Ours is beyond what those reach."""


def seed_dropout(seed: int) -> None:
    """Sets all of Megatron-Core's generators, and under expert tensor parallelism ours."""
    model_parallel_cuda_manual_seed(seed)
    if parallel_state.get_expert_tensor_parallel_world_size() > 1:
        own = seed + _OFFSET + _EXPERTS_APART * parallel_state.get_expert_model_parallel_rank()
        get_cuda_rng_tracker().add(_SLICED_EXPERTS, own)


def _fork(share: Input) -> AbstractContextManager[None]:
    """Draws from the generator for inputs of which a rank has `share`; not for whole ones."""
    if share == "part":
        return get_cuda_rng_tracker().fork()
    sliced = share == "experts" and parallel_state.get_expert_tensor_parallel_world_size() > 1
    return get_cuda_rng_tracker().fork(_SLICED_EXPERTS if sliced else get_expert_parallel_rng_tracker_name())


class InputDropout(nn.Dropout):
    """`nn.Dropout` for an input of which this rank has `share`."""

    def __init__(self, p: float, share: Input) -> None:
        super().__init__(p)
        self.share = share

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Same shape; random numbers are drawn only where there is something to drop."""
        if not self.training or self.p == 0 or self.share == "whole":
            return super().forward(input)
        with _fork(self.share):
            return super().forward(input)
