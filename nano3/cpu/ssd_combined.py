"""The two scan functions of `mamba_ssm.ops.triton.ssd_combined` 2.3.x that megatron-core's Mamba mixer calls.

Both recompute in backward from what the originals save, so that a memory plan made for the GPU's kernels holds for what
is kept between forward and backward here too (the working memory inside a call is this implementation's own).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano3.cpu import ssd
from nano3.cpu.conv import ACTIVATIONS, Convolution, arithmetic, silu_backward

Limit = tuple[float, float]


def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient in its input's dtype, or None where the input was None."""
    return None if grad is None or like is None else grad.to(like.dtype)


class MambaChunkScanCombinedFn(torch.autograd.Function):
    """Saves for backward what the original saves, and nothing else:

    out before the gate, x, dt, the sums of dt*A (b, c, h, k) in FP32, A, B, C, D, z, dt_bias, initial_states, seq_idx.
    """

    @staticmethod
    @ssd.full_precision
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_states: Tensor | None,
        seq_idx: Tensor | None,
        dt_softplus: bool,
        dt_limit: Limit,
    ) -> tuple[Tensor, Tensor]:
        step = ssd.step_sizes(dt, dt_bias, dt_softplus, dt_limit, arithmetic(x, dt, B, C))
        scan = ssd.prepare(x, step, A, B, C, seq_idx, chunk_size)
        out, final = ssd.scan_forward(scan, D, initial_states, x.shape[1])
        out_x = out.to(x.dtype)
        ctx.save_for_backward(out_x, x, dt, scan.cum, A, B, C, D, z, dt_bias, initial_states, seq_idx)
        ctx.chunk_size, ctx.dt_softplus, ctx.dt_limit = chunk_size, dt_softplus, dt_limit
        return (out_x.clone() if z is None else (out * F.silu(z.to(out.dtype))).to(x.dtype)), final

    @staticmethod
    @ssd.full_precision
    def backward(ctx: Any, *grads: Tensor) -> Any:
        out_x, x, dt, cum, A, B, C, D, z, dt_bias, initial, seq_idx = ctx.saved_tensors
        dtype, dout, dz = cum.dtype, grads[0].to(cum.dtype), None
        if z is not None:
            zf = z.to(dtype)
            dz = silu_backward(dout * out_x.to(dtype), zf)
            dout = dout * F.silu(zf)
        step = ssd.step_sizes(dt, dt_bias, ctx.dt_softplus, ctx.dt_limit, dtype)
        scan = ssd.prepare(x, step, A, B, C, seq_idx, ctx.chunk_size, cum)
        g = ssd.scan_backward(scan, A, D, initial, dout, grads[1])
        ddt = ssd.step_sizes_backward(g.dt, dt, dt_bias, ctx.dt_softplus, ctx.dt_limit)
        inputs = (g.x, x), (ddt, dt), (g.A, A), (g.B, B), (g.C, C)
        others = (g.D, D), (dz, z), (ddt.sum((0, 1)), dt_bias), (g.initial, initial)
        return *(cast(*pair) for pair in inputs), None, *(cast(*pair) for pair in others), None, None, None


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limit = ssd.INFINITE,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The chunked scan.

    Args:
        x: (b, l, h, p).
        dt: (b, l, h), before `dt_bias` (h,), softplus if `dt_softplus`, and the clamp to `dt_limit`.
        A: (h,), negative.
        B, C: (b, l, g, n).
        D: (h,) or (h, p), the skip.
        z: (b, l, h, p); the output is multiplied by silu(z).
        initial_states: (b, h, p, n), of document 0.
        seq_idx: (b, l), the document of every token; a document's tokens are contiguous.
        cu_seqlens: used by the original with `return_varlen_states` only, which is inference and not here.

    Returns (b, l, h, p) in x's dtype, and with `return_final_states` also the last document's state (b, h, p, n).
    """
    if return_varlen_states:
        raise NotImplementedError(
            "the CPU backend trains only: return_varlen_states "
            f"({0 if cu_seqlens is None else len(cu_seqlens) - 1} requests) is not here"
        )
    out, final = MambaChunkScanCombinedFn.apply(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit
    )
    return (out, final) if return_final_states else out


class Widths:
    """How the rows of `zxbcdt` and of the convolution divide, from the parameters' shapes."""

    def __init__(self, zxbcdt: Tensor, conv1d_weight: Tensor, D: Tensor, headdim: int | None, groups: int) -> None:
        self.heads = D.shape[0]
        if D.dim() == 2:
            headdim = D.shape[1]
        if headdim is None:
            raise ValueError("headdim is needed when D has one value per head")
        self.headdim, self.groups = headdim, groups
        self.inner = self.heads * headdim
        self.conv = conv1d_weight.shape[0]
        self.group_state = (self.conv - self.inner) // 2
        expected = self.inner + self.conv + self.heads
        if zxbcdt.shape[-1] != expected:
            raise ValueError(f"zxbcdt is {zxbcdt.shape[-1]} wide; z, xBC and dt make {expected}")

    def parts(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (b, l, h*p), xBC (b, l, h*p + 2*g*n), dt (b, l, h)."""
        z, xBC, dt = zxbcdt.split([self.inner, self.conv, self.heads], -1)
        return z, xBC, dt

    def x_B_C(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, l, h, p), B and C (b, l, g, n)."""
        x, B, C = xBC.split([self.inner, self.group_state, self.group_state], -1)
        return (
            x.unflatten(-1, (self.heads, self.headdim)),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
        )


class MambaSplitConv1dScanCombinedFn(torch.autograd.Function):
    """Saves for backward what the original saves in the form that megatron-core uses (no fused norm or out_proj):

    zxbcdt, conv1d_weight, conv1d_bias, out_x (b, l, h, p), A, D, dt_bias, initial_states, seq_idx.
    """

    @staticmethod
    @ssd.full_precision
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        chunk_size: int,
        initial_states: Tensor | None,
        seq_idx: Tensor | None,
        dt_limit: Limit,
        silu: bool,
        headdim: int | None,
        ngroups: int,
    ) -> tuple[Tensor, Tensor]:
        widths = Widths(zxbcdt, conv1d_weight, D, headdim, ngroups)
        z, xBC, dt = widths.parts(zxbcdt)
        x, B, C = widths.x_B_C(Convolution(xBC, conv1d_weight, conv1d_bias, seq_idx, None, silu).output())
        step = ssd.step_sizes(dt, dt_bias, True, dt_limit, arithmetic(zxbcdt))
        scan = ssd.prepare(x, step, A, B, C, seq_idx, chunk_size)
        out, final = ssd.scan_forward(scan, D, initial_states, zxbcdt.shape[1])
        ctx.save_for_backward(
            zxbcdt, conv1d_weight, conv1d_bias, out.to(zxbcdt.dtype), A, D, dt_bias, initial_states, seq_idx
        )
        ctx.chunk_size, ctx.dt_limit, ctx.silu = chunk_size, dt_limit, silu
        ctx.widths = widths
        return (out.flatten(2) * F.silu(z.to(out.dtype))).to(zxbcdt.dtype), final

    @staticmethod
    @ssd.full_precision
    def backward(ctx: Any, *grads: Tensor) -> Any:
        zxbcdt, weight, bias, out_x, A, D, dt_bias, initial, seq_idx = ctx.saved_tensors
        widths, dtype = ctx.widths, arithmetic(zxbcdt)
        z, xBC, dt = widths.parts(zxbcdt)
        zf, dout = z.to(dtype), grads[0].to(dtype)
        dz = silu_backward(dout * out_x.flatten(2).to(dtype), zf)
        dout = (dout * F.silu(zf)).unflatten(-1, (widths.heads, widths.headdim))

        convolution = Convolution(xBC, weight, bias, seq_idx, None, ctx.silu)
        x, B, C = widths.x_B_C(convolution.output())
        step = ssd.step_sizes(dt, dt_bias, True, ctx.dt_limit, dtype)
        g = ssd.scan_backward(ssd.prepare(x, step, A, B, C, seq_idx, ctx.chunk_size), A, D, initial, dout, grads[1])
        ddt = ssd.step_sizes_backward(g.dt, dt, dt_bias, True, ctx.dt_limit)
        dconv = torch.cat([g.x.flatten(2), g.B.flatten(2), g.C.flatten(2)], -1)
        dxBC, dweight, dbias, _ = convolution.backward(dconv)
        inputs = (torch.cat([dz, dxBC, ddt], -1), zxbcdt), (dweight, weight), (dbias, bias)
        others = (ddt.sum((0, 1)), dt_bias), (g.A, A), (g.D, D)
        nones = (None,) * 5
        return *(cast(*pair) for pair in (*inputs, *others)), None, cast(g.initial, initial), *nones


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: Limit = ssd.INFINITE,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Everything between the Mamba mixer's in_proj and its norm: split, convolution, scan, gate.

    Args:
        zxbcdt: (b, l, 2*h*p + 2*g*n + h), rows z, x, B, C, dt.
        conv1d_weight: (h*p + 2*g*n, w); `conv1d_bias` (h*p + 2*g*n,).
        dt_bias, A: (h,). D: (h,), then `headdim` is needed, or (h, p).
        initial_states: (b, h, p, n), of document 0. seq_idx: (b, l).
        rmsnorm_weight ... outproj_bias, norm_before_gate: the original's fused norm and projection. megatron-core
            passes none of them (it applies its own norm and out_proj, and no norm happens here whatever the order), so
            they raise `NotImplementedError`.

    Returns (b, l, h*p) in zxbcdt's dtype, and with `return_final_states` also (b, h, p, n).
    """
    if rmsnorm_weight is not None or outproj_weight is not None or outproj_bias is not None:
        raise NotImplementedError(
            f"mamba_split_conv1d_scan_combined on the CPU has no fused norm (eps {rmsnorm_eps}, norm_before_gate "
            f"{norm_before_gate}) or out_proj: megatron-core applies both itself"
        )
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"activation {activation!r}: use one of None, 'silu', 'swish'")
    out, final = MambaSplitConv1dScanCombinedFn.apply(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        initial_states,
        seq_idx,
        dt_limit,
        activation is not None,
        headdim,
        ngroups,
    )
    return (out, final) if return_final_states else out
