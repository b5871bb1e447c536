"""`mamba_chunk_scan_combined` of `mamba_ssm.ops.triton.ssd_combined` 2.3.x: the scan alone.

Its backward recomputes from what the original saves, so that a memory plan made for the GPU's kernels holds for what
is kept between forward and backward here too (the working memory inside a call is this implementation's own).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano3.cpu import ssd
from nano3.cpu.conv import arithmetic, silu_backward

Limit = ssd.Limit


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
        scan = ssd.prepare(x, step, A, B, C, ssd.make_plan(seq_idx, x.shape[1], chunk_size, step))
        states, final = scan.states(initial_states)
        out = ssd.scan_forward(scan, states, D, x.shape[1])
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
        scan = ssd.prepare(x, step, A, B, C, ssd.make_plan(seq_idx, x.shape[1], ctx.chunk_size, step), cum)
        states, _ = scan.states(initial)
        g = ssd.scan_backward(scan, states, A, D, dout, grads[1], ctx.needs_input_grad[6])
        ddt = ssd.step_sizes_backward(g.dt, dt, dt_bias, ctx.dt_softplus, ctx.dt_limit)
        inputs = (g.x, x), (ddt, dt), (g.A, A), (g.B, B), (g.C, C)
        others = (g.D, D), (dz, z), (ddt.sum((0, 1)), dt_bias), (g.initial, initial)
        return *(ssd.cast(*pair) for pair in inputs), None, *(ssd.cast(*pair) for pair in others), None, None, None


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
