"""Weight-decomposed LoRA (DoRA, arXiv 2402.09353): a trained length for every output row of an adapted weight.

    W' = g * (W + s B A),   g = m / |W + s B A|   row by row

m, the magnitude, starts at |W|, so that a fresh adapter changes nothing. As in the paper (section 4.3) and in PEFT no
gradient flows through the length in the denominator. It is taken over the whole input, in FP32, whatever the precision
and the parallel layout, and W + s B A is never formed: with V = W + s B A

    |V|^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2 ,   <W, B A> = rowsum(B * W A^T) ,   |B A|^2 = rowsum(B (A A^T) * B)

which reads W once and costs as many operations as `rank` more tokens. A row of zeros in W (padding of the
vocabulary) has no length to learn: g is 1 there.

Routed experts have a magnitude each, also where they share one adapter: their weights differ in length, and one common
vector could not start as the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nano3.kept_dtypes import keep_dtype

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A weight (out, in) and the factors A (rank, in) and B (out, rank) of its delta; of the local rows or columns."""

MAGNITUDE = "magnitude"


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squared_lengths(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) -> (out,) squared row lengths, FP32 (FP64 of FP64)."""
    return _wide(weight).square().sum(-1)


def squared_change(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scale: float) -> torch.Tensor:
    """|W + s B A|^2 - |W|^2 by row, likewise; exactly zero while B is zero. Additive over slices of the input."""
    low, high = _wide(low), _wide(high)
    cross = (high * (_wide(weight) @ low.T)).sum(-1)
    own = (high @ (low @ low.T) * high).sum(-1)
    return 2 * scale * cross + scale**2 * own


class Decomposed(nn.Module):
    """What an adapter needs to be a DoRA adapter. Without `add_magnitude` it is a plain one."""

    magnitude: nn.Parameter | None
    scale: float
    routed = False
    """Whether it adapts routed experts: then there is a magnitude for each local one, also for a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter(MAGNITUDE, None)
        self._squares: torch.Tensor | None = None

    def parts(self, base: Any) -> list[Part]:
        """One part, or one for every local expert; every kind of adapter knows its own."""
        raise NotImplementedError

    def over_columns(self, squares: torch.Tensor) -> torch.Tensor:
        """Adds up what the slices of the input contribute; here the input is whole."""
        return squares

    def add_magnitude(self, base: Any, **attributes: Any) -> None:
        """Makes `magnitude`, (out,) or (local experts, out), FP32; `attributes` tell Megatron-Core how to reduce it."""
        self.magnitude = nn.Parameter(self._base_squares(base).sqrt())
        for name, value in attributes.items():
            setattr(self.magnitude, name, value)
        keep_dtype(self, (MAGNITUDE,))  # g would start at 1 within the 8 bits of BF16 instead of at 1

    @torch.no_grad()
    def _base_squares(self, base: Any) -> torch.Tensor:
        return self._rows([squared_lengths(weight) for weight, _, _ in self.parts(base)])

    @torch.no_grad()
    def _lengths(self, base: Any) -> torch.Tensor:
        """|W + s B A| by row, in the magnitude's shape; a row of zeros in W gives zero."""
        if self._squares is None:  # W is frozen: once is enough
            self._squares = self._base_squares(base)
        change = self._rows([squared_change(*part, self.scale) for part in self.parts(base)])
        tiny = torch.finfo(torch.float32).tiny
        return torch.where(self._squares > 0, (self._squares + change).clamp_min(tiny).sqrt(), 0)

    def _rows(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Of every part (out,): in the magnitude's shape, over the whole input."""
        return self.over_columns(torch.stack(values) if self.routed else values[0])

    def row_scale(self, base: Any) -> torch.Tensor:
        """g, FP32, in the magnitude's shape."""
        assert self.magnitude is not None
        return scale_of(self.magnitude, self._lengths(base))


def scale_of(magnitude: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """magnitude / lengths, and 1 where the length is given as zero."""
    known = lengths > 0
    return torch.where(known, magnitude / torch.where(known, lengths, 1), 1)
