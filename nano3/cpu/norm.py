"""The gated RMSNorm in plain PyTorch: what `mamba_ssm.ops.triton.layernorm_gated` does on a GPU.

With gate after norm (`norm_before_gate`): rms(x) * weight * silu(z); otherwise rms(x * silu(z)) * weight, the form of
Nemotron-H. The RMS is per group of `group_size` channels. Arithmetic is FP32, or FP64 for FP64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano3.cpu.conv import arithmetic, silu_backward
from nano3.cpu.rms import normalize, normalize_backward, normalized


class RMSNormFn(torch.autograd.Function):
    """Saves for backward what the original saves: x, weight, bias, rstd (one per token and group), z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
    ) -> Tensor:
        dtype = arithmetic(x, weight)
        u = x.to(dtype)
        gate = None if z is None else F.silu(z.to(dtype))
        if gate is not None and not norm_before_gate:
            u = u * gate
        y, rstd = normalize(u, weight.to(dtype), eps, group_size)
        if bias is not None:
            y = y + bias.to(dtype)
        if gate is not None and norm_before_gate:
            y = y * gate
        ctx.save_for_backward(x, weight, bias, rstd.unsqueeze(-1), z)
        ctx.norm_before_gate = norm_before_gate
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, rstd, z = ctx.saved_tensors
        rstd, dtype = rstd.squeeze(-1), rstd.dtype
        dy, xf, w = grads[0].to(dtype), x.to(dtype), weight.to(dtype)
        zf = xf if z is None else z.to(dtype)  # without a gate neither branch below reads it
        gate_first, gate_last = z is not None and not ctx.norm_before_gate, z is not None and ctx.norm_before_gate
        u = xf * F.silu(zf) if gate_first else xf
        dz = dweight = dbias = None
        if gate_last:
            y = normalized(u, rstd) * w
            dz = silu_backward(dy * (y if bias is None else y + bias.to(dtype)), zf)
            dy = dy * F.silu(zf)
        tokens = tuple(range(x.dim() - 1))
        if ctx.needs_input_grad[1]:
            dweight = (dy * normalized(u, rstd)).sum(tokens).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(tokens).to(bias.dtype)
        du = normalize_backward(dy, u, w, rstd)
        if gate_first:
            dz = silu_backward(du * xf, zf)
            du = du * F.silu(zf)
        return du.to(x.dtype), dweight, dbias, None if dz is None else dz.to(z.dtype), None, None, None


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Gated RMSNorm of x (..., d), in its dtype. `weight`, `bias` (d,), `z` (..., d); no group size means one group."""
    return RMSNormFn.apply(x, weight, bias, z, eps, group_size or x.shape[-1], norm_before_gate)


class RMSNorm(torch.nn.Module):
    """Gated RMSNorm with a weight of ones and no bias; the class that megatron-core's Mamba mixer extends."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones."""
        torch.nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x (..., d), optional gate z (..., d) -> (..., d)."""
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
