"""`mamba_split_conv1d_scan_combined` of `mamba_ssm.ops.triton.ssd_combined` 2.3.x: what megatron-core trains with.

Everything between the Mamba mixer's in_proj and its norm. On a CPU compiled loops do it (`scan_row.py`); on any other
device it is the convolution and the scan of this folder, one after the other, which `make gpu-check` compares with the
GPU's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nano3.cpu import ssd
from nano3.cpu.arrays import array
from nano3.cpu.conv import ACTIVATIONS, arithmetic, causal_conv1d_fn
from nano3.cpu.ssd_combined import mamba_chunk_scan_combined

if TYPE_CHECKING:  # Numba compiles for a CPU alone, and need not be there on a GPU
    from nano3.cpu.scan_row import Row


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

    def heads_of(self, tensor: Tensor) -> Tensor:
        """(b, l, h*p) -> (b, l, h, p)."""
        return tensor.unflatten(-1, (self.heads, self.headdim))

    def x_B_C(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, l, h, p), B and C (b, l, g, n)."""
        x, B, C = xBC.split([self.inner, self.group_state, self.group_state], -1)
        return self.heads_of(x), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))


def documents(seq_idx: Tensor | None, row: int, length: int) -> np.ndarray:
    """The index of the first token of each token's document, -1 for document 0, which the initial state belongs to."""
    if seq_idx is None:
        return np.full(length, -1)
    numbers = array(seq_idx[min(row, len(seq_idx) - 1)])
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
    first = np.repeat(starts, np.diff(starts, append=length))
    if numbers[0] == 0:
        first[first == 0] = -1
    return first


@dataclass
class Call:
    """The tensors and settings of one call."""

    zxbcdt: Tensor
    weight: Tensor
    bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    initial: Tensor | None
    seq_idx: Tensor | None
    limit: ssd.Limit
    silu: bool
    widths: Widths

    def __post_init__(self) -> None:
        self.dtype = arithmetic(self.zxbcdt)
        _, _, self.dt = self.widths.parts(self.zxbcdt)
        self.steps = ssd.step_sizes(self.dt, self.dt_bias, True, self.limit, self.dtype).contiguous()

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def rows(self) -> Iterator[Row]:
        """The rows of the batch, each ready for its way through the loops."""
        from nano3.cpu.scan_row import Parameters, Row

        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        skip = self.D.reshape(self.widths.heads, -1).expand(-1, self.widths.headdim)
        taps, bias, A, skip = (t.detach().to(self.dtype).contiguous() for t in (self.weight.t(), bias, self.A, skip))
        parameters = Parameters(taps, bias, A, skip, self.widths.groups, self.silu)
        for number, (row, steps) in enumerate(zip(self.zxbcdt.to(self.dtype), self.steps, strict=True)):
            yield Row(row.contiguous(), steps, documents(self.seq_idx, number, len(row)), parameters)

    def states(self) -> Tensor:
        """Those before the first token, (b, h, p, n)."""
        if self.initial is not None:
            return self.initial.to(self.dtype)
        state = self.widths.group_state // self.widths.groups
        return torch.zeros(len(self.zxbcdt), self.widths.heads, self.widths.headdim, state, dtype=self.dtype)


class MambaSplitConv1dScanCombinedFn(torch.autograd.Function):
    """Saves for backward what the original saves in the form that megatron-core uses (no fused norm or out_proj):

    zxbcdt, conv1d_weight, conv1d_bias, out_x (b, l, h, p), A, D, dt_bias, initial_states, seq_idx;

    and, which the original computes again, the states between spans of 256 tokens (b, spans - 1, h, p, n), in FP32.
    """

    @staticmethod
    @ssd.full_precision
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        initial: Tensor | None,
        seq_idx: Tensor | None,
        limit: ssd.Limit,
        silu: bool,
        widths: Widths,
    ) -> tuple[Tensor, Tensor]:
        call = Call(zxbcdt, weight, bias, dt_bias, A, D, initial, seq_idx, limit, silu, widths)
        before, out = (call.new(*zxbcdt.shape[:2], widths.heads, widths.headdim) for _ in range(2))
        rows, states = list(call.rows()), call.states()
        between = call.new(len(rows), len(rows[0].spans) - 1, *states.shape[1:])
        final = torch.stack(
            [row.forward(state, *into) for row, state, *into in zip(rows, states, before, out, between, strict=True)]
        )
        kept = before.to(zxbcdt.dtype)
        ctx.save_for_backward(zxbcdt, weight, bias, kept, A, D, dt_bias, initial, seq_idx, between)
        ctx.limit, ctx.silu, ctx.widths = limit, silu, widths
        return out.flatten(2).to(zxbcdt.dtype), final

    @staticmethod
    @ssd.full_precision
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from nano3.cpu.scan_row_backward import Backward, Gradients, Sums

        zxbcdt, weight, bias, kept, A, D, dt_bias, initial, seq_idx, between = ctx.saved_tensors
        call = Call(zxbcdt, weight, bias, dt_bias, A, D, initial, seq_idx, ctx.limit, ctx.silu, ctx.widths)
        before, dout = kept.to(call.dtype), call.widths.heads_of(grads[0]).to(call.dtype).contiguous()
        rows, ddt, decays = (call.new(*shape) for shape in (zxbcdt.shape, call.dt.shape, call.dt.shape))
        sums = None
        if any(ctx.needs_input_grad[1:6]):
            shapes = (weight.shape[::-1], weight.shape[:1], before.shape[2:])
            sums = Sums(*(call.new(*shape).zero_() for shape in shapes))
        parts = zip(call.rows(), call.states(), between, before, dout, grads[1], rows, ddt, decays, strict=True)
        states = [
            Backward(row, own, asked, Gradients(drow, dsteps, dlogs, sums)).run(state, inside, dstate)
            for row, state, inside, own, asked, dstate, drow, dsteps, dlogs in parts
        ]
        rows[..., -ctx.widths.heads :] = ddt = ssd.step_sizes_backward(ddt, call.dt, dt_bias, True, call.limit)
        parameters: tuple[Tensor | None, ...] = (None,) * 5
        if sums is not None:
            dD, dA = sums.skip if D.dim() == 2 else sums.skip.sum(1), (decays * call.steps).sum((0, 1))
            found = (sums.taps.t(), sums.bias, ddt.sum((0, 1)), dA, dD)
            wanted = (weight, bias, dt_bias, A, D)
            parameters = tuple(ssd.cast(grad, like) for grad, like in zip(found, wanted, strict=True))
        return rows.to(zxbcdt.dtype), *parameters, ssd.cast(torch.stack(states), initial), *(None,) * 4


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
    widths = Widths(zxbcdt, conv1d_weight, D, headdim, ngroups)
    inputs = (zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states, seq_idx, dt_limit)
    if zxbcdt.device.type == "cpu":
        out, final = MambaSplitConv1dScanCombinedFn.apply(*inputs, activation is not None, widths)
    else:
        out, final = one_after_the_other(*inputs, activation, widths, chunk_size)
    return (out, final) if return_final_states else out


def one_after_the_other(
    zxbcdt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    initial: Tensor | None,
    seq_idx: Tensor | None,
    limit: ssd.Limit,
    activation: str | None,
    widths: Widths,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's operations, on any device: the convolution, then scan and gate."""
    z, xBC, dt = widths.parts(zxbcdt)
    x, B, C = widths.x_B_C(causal_conv1d_fn(xBC.mT, weight, bias, seq_idx, activation=activation).mT)
    inputs = (x, dt, A, B, C, chunk, D, widths.heads_of(z), dt_bias, initial, seq_idx)
    out, final = mamba_chunk_scan_combined(*inputs, dt_softplus=True, dt_limit=limit, return_final_states=True)
    return out.flatten(2), final
