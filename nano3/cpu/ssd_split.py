"""`mamba_split_conv1d_scan_combined` of `mamba_ssm.ops.triton.ssd_combined` 2.3.x: what megatron-core trains with.

Everything between the Mamba mixer's in_proj and its norm. It takes the tokens in spans that fit into a core's cache,
each from the state that the last one left, because on a CPU the passes over memory cost more than the arithmetic.
Backward recomputes from what the original saves, as `mamba_chunk_scan_combined` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano3.cpu import ssd
from nano3.cpu.conv import ACTIVATIONS, Convolution, arithmetic, ids_with_context, silu_backward, with_context

SPAN = 512
"""Tokens at a time: at pico's widths the largest array of a span is 1 MB. Results depend on it by rounding only."""


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


@dataclass
class Call:
    """The tensors and settings of one call."""

    zxbcdt: Tensor
    weight: Tensor
    bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    seq_idx: Tensor | None
    chunk: int
    limit: ssd.Limit
    silu: bool
    widths: Widths

    def spans(self) -> Iterator[Span]:
        """The call's tokens in order."""
        length = self.zxbcdt.shape[1]
        for start in range(0, length, SPAN):
            yield Span(self, start, min(start + SPAN, length))

    def context(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The convolution's input and its documents for the tokens from `start` to `stop` and the w-1 before."""
        wanted = self.weight.shape[1] - 1
        first = max(start - wanted, 0)
        _, xBC, _ = self.widths.parts(self.zxbcdt[:, first:stop])
        ids = None if self.seq_idx is None else self.seq_idx[:, first:stop]
        missing = wanted - (start - first)
        return (with_context(xBC, missing), ids_with_context(ids, missing)) if missing else (xBC, ids)


class Span:
    """Some consecutive tokens of a call, on their way through the convolution into the scan."""

    def __init__(self, call: Call, start: int, stop: int) -> None:
        self.call, self.tokens, self.length = call, slice(start, stop), stop - start
        self.z, _, self.dt = call.widths.parts(call.zxbcdt[:, self.tokens])
        self.convolution = Convolution(*call.context(start, stop), call.weight, call.bias, call.silu)
        dtype = arithmetic(call.zxbcdt)
        step = ssd.step_sizes(self.dt, call.dt_bias, True, call.limit, dtype)
        ids = entering = None
        if call.seq_idx is not None:
            ids, entering = call.seq_idx[:, self.tokens], call.seq_idx[:, start - 1 : start] if start else None
        plan = ssd.make_plan(ids, self.length, call.chunk, step, entering)
        x, B, C = call.widths.x_B_C(self.convolution.output())
        self.scan = ssd.prepare(x, step, call.A, B, C, plan)
        self.gate = self.z.to(dtype)

    def gated(self, out: Tensor) -> Tensor:
        """(b, l, h, p) -> (b, l, h*p)."""
        return out.flatten(2) * F.silu(self.gate)

    def backward(self, states: Tensor, out: Tensor, dout: Tensor, dstate: Tensor, trained: bool) -> SpanGrads:
        """From the gradients of the gated output (b, l, h*p) and of the state after the span.

        `states` before every chunk, `out` (b, l, h, p) before the gate; `trained`: the parameters want gradients.
        """
        call, dtype = self.call, self.gate.dtype
        dout = dout.to(dtype)
        dz = silu_backward(dout * out.flatten(2).to(dtype), self.gate)
        dout = (dout * F.silu(self.gate)).unflatten(-1, out.shape[2:])
        g = ssd.scan_backward(self.scan, states, call.A, call.D, dout, dstate, trained)
        ddt = ssd.step_sizes_backward(g.dt, self.dt, call.dt_bias, True, call.limit)
        dconv = torch.cat([g.x.flatten(2), g.B.flatten(2), g.C.flatten(2)], -1)
        dpadded, dweight, dbias = self.convolution.backward(dconv, trained)
        return SpanGrads(dz, dpadded, ddt, g.initial, (dweight, dbias, ddt.sum((0, 1)), g.A, g.D))


@dataclass
class SpanGrads:
    """Gradients of a span."""

    z: Tensor  # (b, l, h*p)
    padded: Tensor  # (b, w-1 + l, h*p + 2*g*n): of the tokens before the span as well
    dt: Tensor  # (b, l, h)
    state: Tensor  # (b, h, p, n), of the state before the span
    parameters: tuple[Tensor | None, ...]  # conv1d_weight, conv1d_bias, dt_bias, A, D


def total(parts: tuple[Tensor | None, ...], like: Tensor | None) -> Tensor | None:
    """The sum of the spans' gradients of a parameter, None where it has none."""
    return None if parts[0] is None else ssd.cast(torch.stack(parts).sum(0), like)  # type: ignore[arg-type]


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
        dt_limit: ssd.Limit,
        silu: bool,
        headdim: int | None,
        ngroups: int,
    ) -> tuple[Tensor, Tensor]:
        widths = Widths(zxbcdt, conv1d_weight, D, headdim, ngroups)
        inputs = (zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, seq_idx)
        call = Call(*inputs, chunk_size, dt_limit, silu, widths)
        out_x = zxbcdt.new_empty(*zxbcdt.shape[:2], widths.heads, widths.headdim)
        y = zxbcdt.new_empty(*zxbcdt.shape[:2], widths.inner)
        state: Any = initial_states
        for span in call.spans():
            states, state = span.scan.states(state)
            out = ssd.scan_forward(span.scan, states, D, span.length)
            out_x[:, span.tokens] = out
            y[:, span.tokens] = span.gated(out)
        ctx.save_for_backward(zxbcdt, conv1d_weight, conv1d_bias, out_x, A, D, dt_bias, initial_states, seq_idx)
        ctx.chunk_size, ctx.dt_limit, ctx.silu = chunk_size, dt_limit, silu
        ctx.widths = widths
        return y, state

    @staticmethod
    @ssd.full_precision
    def backward(ctx: Any, *grads: Tensor) -> Any:
        zxbcdt, weight, bias, out_x, A, D, dt_bias, initial, seq_idx = ctx.saved_tensors
        call = Call(zxbcdt, weight, bias, dt_bias, A, D, seq_idx, ctx.chunk_size, ctx.dt_limit, ctx.silu, ctx.widths)
        inputs, trained = (weight, bias, dt_bias, A, D), any(ctx.needs_input_grad[1:6])
        spans, before, state = list(call.spans()), [], initial
        for span in spans:
            states, state = span.scan.states(state)
            before.append(states)
        dzxbcdt = torch.empty_like(zxbcdt)
        dz, dxBC, ddt = ctx.widths.parts(dzxbcdt)
        parameters: list[tuple[Tensor | None, ...]] = []
        dstate, later, context = grads[1], None, weight.shape[1] - 1
        for span, states in zip(reversed(spans), reversed(before), strict=True):
            g = span.backward(states, out_x[:, span.tokens], grads[0][:, span.tokens], dstate, trained)
            if later is not None:
                g.padded[:, span.length :] += later
            dz[:, span.tokens], dxBC[:, span.tokens], ddt[:, span.tokens] = g.z, g.padded[:, context:], g.dt
            dstate, later = g.state, g.padded[:, :context]
            parameters.append(g.parameters)
        totals = (total(parts, like) for parts, like in zip(zip(*parameters, strict=True), inputs, strict=True))
        return dzxbcdt, *totals, None, ssd.cast(dstate, initial), *(None,) * 5


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
    dt_limit: ssd.Limit = ssd.INFINITE,
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
