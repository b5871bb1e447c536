"""RMSNorm of Transformer Engine: statistics in FP32 (FP64 stays FP64), result in the input's dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

from nano3.cpu.rms import normalize, normalize_backward
from nano3.cpu.te.base import TransformerEngineBaseModule, refuse


class _RMSNorm(torch.autograd.Function):
    """Saves input, weight and 1/rms (..., 1), as the original does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        out, rstd = normalize(wide, weight.to(wide.dtype), eps, x.shape[-1])
        ctx.save_for_backward(x, weight, rstd)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        wide, dy = x.to(rstd.dtype), grads[0].to(rstd.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = normalize_backward(dy, wide, weight.to(rstd.dtype), rstd).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy * wide).mul_(rstd).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dweight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; x (..., hidden), weight (hidden,)."""
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(TransformerEngineBaseModule):
    """Signature of transformer_engine.pytorch.RMSNorm 2.10 (`device` travels in its keyword arguments there)."""

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        refuse("RMSNorm", zero_centered_gamma=zero_centered_gamma)
        self.eps = eps
        shape = hidden_size if normalized_shape is None else normalized_shape
        self.weight = Parameter(torch.ones(shape, dtype=params_dtype, device=device))  # type: ignore[call-overload, arg-type]
        self.weight.sequence_parallel = bool(sequence_parallel)  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return rms_norm(input, self.weight, self.eps)
