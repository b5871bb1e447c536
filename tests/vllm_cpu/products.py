"""Routed experts without a gate, down(relu(up x)^2), in plain PyTorch: vLLM has their products for GPUs only. No vLLM.

Shapes: tokens T, experts E, chosen experts a token K, adapters A, rank R. Products are computed in FP32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Adapters:
    """LoRA beside a matrix: `low` (A, E, R, in), `high` (A, E, out, R), which holds alpha / rank already."""

    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True)
class Matrices:
    """One matrix of every expert.

    `weight` (E, out, in): numbers, or FP8 codes that stand for code * `scale` (E,). `input_scale`, a scalar: what is
    multiplied with the matrix is rounded to E4M3 at that scale first, saturating; None: it is taken as it is.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    adapters: Adapters | None = None

    def times(self, value: torch.Tensor, expert: int, slots: torch.Tensor | None) -> torch.Tensor:
        """`value` (N, in), FP32, through one expert's matrix: (N, out). `slots` (N,): each token's adapter, or -1."""
        product = self._rounded(value) @ self.weight[expert].float().T
        if self.scale is not None:
            product = product * self.scale[expert].float()
        if self.adapters is None or slots is None:
            return product
        for slot in slots[slots >= 0].unique().tolist():
            rows = slots == slot
            low, high = self.adapters.low[slot, expert].float(), self.adapters.high[slot, expert].float()
            product[rows] += value[rows] @ low.T @ high.T
        return product

    def _rounded(self, value: torch.Tensor) -> torch.Tensor:
        if self.input_scale is None:
            return value
        scale = self.input_scale.float()
        return (value / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


def relu2_experts(
    hidden: torch.Tensor,
    up: Matrices,
    down: Matrices,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, (T, hidden), in the dtype of `hidden` (T, hidden).

    `weights` and `chosen` (T, K): each token's experts and their weights; `slots` (T,): its adapter, -1 for none.
    """
    value, total = hidden.float(), torch.zeros_like(hidden, dtype=torch.float32)
    for expert in chosen.unique().tolist():
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        mine = None if slots is None else slots[tokens]
        inner = up.times(value[tokens], expert, mine).relu().square()
        output = down.times(inner, expert, mine)
        total.index_add_(0, tokens, output * weights[tokens, places, None].float())
    return total.to(hidden.dtype)
