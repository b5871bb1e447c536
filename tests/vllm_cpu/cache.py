"""How vLLM's CPU kernels put keys and values into an FP8 cache: rounded toward zero, where its GPU kernels round to the
nearest code. Read in csrc/cpu/cpu_attn_fp8.hpp of vLLM (main branch of November 2026); docs/fp8.md has the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from nano3.fp8_emulation import LARGEST
from nano3.reference_linears import tap_model


def toward_zero(value: torch.Tensor, scale: float) -> torch.Tensor:
    """`value`, any shape, as vLLM's CPU cache holds it at `scale`: E4M3's bits, the others cut off; in its dtype."""
    inside = (value.float() * (1 / torch.tensor(scale))).clamp(-LARGEST, LARGEST)
    exponent = torch.frexp(inside).exponent.clamp(min=-5) - 4  # of E4M3's steps around each value
    return (torch.ldexp(torch.ldexp(inside, -exponent).trunc(), exponent) * scale).to(value.dtype)


def into_cache(model: Any, scales: Mapping[str, float], how: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    """Makes a transformers model do `how` to what its key and value projections, by name, put into the cache."""

    def cached(_value: torch.Tensor, output: torch.Tensor, scale: float) -> torch.Tensor:
        return how(output, scale)

    tap_model(model, {}, {name: partial(cached, scale=scale) for name, scale in scales.items()})
