"""RMSNorm of Transformer Engine: statistics in FP32 (FP64 stays FP64), result in the input's dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from nano3.cpu.te.base import TransformerEngineBaseModule, refuse


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; x (..., hidden), weight (hidden,)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(compute), (x.shape[-1],), weight.to(compute), eps).to(x.dtype)


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
