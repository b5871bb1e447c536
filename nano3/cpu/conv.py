"""The short causal depthwise convolution in plain PyTorch: what the package `causal_conv1d` does on a GPU.

    y_t = act(bias + sum_k weight[k] * x_{t - (width-1) + k})

where tokens of another document (`seq_idx`), and tokens before the first one, count as zeros.

Shapes: b batch, l tokens, d channels, w width. Inside, tokens come before channels (b, l, d): the layout of the
projection that feeds it, and one in which a shift by a token is a slice. Arithmetic is FP32, or FP64 for FP64 inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = (None, "silu", "swish")


def arithmetic(*tensors: Tensor | None) -> torch.dtype:
    """FP64 if any input is FP64, else FP32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of silu(x): grad * s * (1 + x * (1 - s)) with s = sigmoid(x), in one pass over memory."""
    return torch.ops.aten.silu_backward(grad, x)


class Edges(NamedTuple):
    """The tokens (r of them) so close behind the start of a document that some of their taps belong to another one."""

    batch: Tensor  # (r, 1)
    taps: Tensor  # (r, w): positions of the taps in the padded input
    foreign: Tensor  # (r, w, 1): true where the tap belongs to another document

    @property
    def token(self) -> tuple[Tensor, Tensor]:
        """Index of the tokens themselves in an unpadded (b, l, d)."""
        return self.batch[:, 0], self.taps[:, 0]


def find_edges(seq_idx: Tensor, batch: int, width: int) -> Edges:
    """From seq_idx (b or 1, l). What stands before the first token (initial states or zeros) is of its document."""
    padded = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1).expand(batch, -1)
    foreign = padded.unfold(1, width, 1) != seq_idx.unsqueeze(-1)
    rows = foreign.any(-1).nonzero()
    offsets = torch.arange(width, device=seq_idx.device)
    return Edges(rows[:, :1], rows[:, 1:] + offsets, foreign[rows[:, 0], rows[:, 1]].unsqueeze(-1))


class Convolution:
    """One convolution of x (b, l, d) and what its backward needs.

    `weight` (d, w), `bias` (d,), `seq_idx` (b, l), `initial` (b, d, w-1). All tokens but the few at document edges are
    computed without looking at documents, as shifts of the whole input; those at edges one by one, with their taps.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial: Tensor | None, silu: bool
    ) -> None:
        dtype = arithmetic(x, weight)
        self.dtype, self.length, self.silu = x.dtype, x.shape[1], silu
        self.has_bias, self.has_initial = bias is not None, initial is not None
        self.weight = weight.to(dtype).t()  # (w, d)
        batch, width = x.shape[0], weight.shape[1]
        before = x.new_zeros(batch, width - 1, x.shape[2]) if initial is None else initial.to(x.dtype).transpose(1, 2)
        self.padded = torch.cat([before, x], 1).to(dtype)
        self.edges = None if seq_idx is None else find_edges(seq_idx, batch, width)
        y = self.shifted(0) * self.weight[0]
        for k in range(1, width):
            y.addcmul_(self.shifted(k), self.weight[k])
        if self.edges is not None:
            y[self.edges.token] = (self.edge_taps(self.edges) * self.weight).sum(1)
        self.preactivation = y if bias is None else y.add_(bias.to(dtype))

    def shifted(self, k: int) -> Tensor:
        """Tap k of every token, (b, l, d), the oldest first."""
        return self.padded[:, k : k + self.length]

    def edge_taps(self, edges: Edges) -> Tensor:
        """The taps of the tokens at edges (r, w, d), with other documents' set to zero."""
        return self.padded[edges.batch, edges.taps].masked_fill_(edges.foreign, 0.0)

    def output(self) -> Tensor:
        """(b, l, d) in x's dtype."""
        return (F.silu(self.preactivation) if self.silu else self.preactivation).to(self.dtype)

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of x (b, l, d), weight, bias and initial states, in the arithmetic's dtype; None where absent."""
        width = self.weight.shape[0]
        dy = dout.to(self.weight.dtype)
        dy = silu_backward(dy, self.preactivation) if self.silu else dy.clone()
        dbias = dy.sum((0, 1)) if self.has_bias else None
        dpadded = torch.zeros_like(self.padded)
        dweight = torch.zeros_like(self.weight)
        if self.edges is not None:
            dedge = dy[self.edges.token].unsqueeze(1)  # (r, 1, d)
            dy[self.edges.token] = 0.0
            dweight += (dedge * self.edge_taps(self.edges)).sum(0)
            dtaps = (dedge * self.weight).masked_fill_(self.edges.foreign, 0.0)
            dpadded.index_put_((self.edges.batch.expand_as(self.edges.taps), self.edges.taps), dtaps, accumulate=True)
        product = torch.empty_like(dy)  # one buffer: fresh memory costs more than the arithmetic
        for k in range(width):
            dpadded[:, k : k + self.length].addcmul_(dy, self.weight[k])
            dweight[k] += torch.mul(dy, self.shifted(k), out=product).sum((0, 1))
        dinitial = dpadded[:, : width - 1].transpose(1, 2) if self.has_initial else None
        return dpadded[:, width - 1 :], dweight.t(), dbias, dinitial


class CausalConv1dFn(torch.autograd.Function):
    """Saves for backward what the original saves: x, weight, bias, seq_idx, initial_states."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seq_idx: Tensor | None,
        initial_states: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, seq_idx, initial_states)
        ctx.silu = silu
        return Convolution(x.transpose(1, 2), weight, bias, seq_idx, initial_states, silu).output().transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, seq_idx, initial = ctx.saved_tensors
        convolution = Convolution(x.transpose(1, 2), weight, bias, seq_idx, initial, ctx.silu)
        dx, dweight, dbias, dinitial = convolution.backward(grads[0].transpose(1, 2))
        return (
            dx.transpose(1, 2).to(x.dtype),
            dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            None,
            None if dinitial is None else dinitial.to(initial.dtype),
            None,
        )


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Causal depthwise convolution, with the signature of `causal_conv1d.causal_conv1d_fn` 1.7.0.

    Args:
        x: (b, d, l) in any layout.
        weight: (d, w).
        bias: (d,).
        seq_idx: (b, l), equal within a document; entries must not be negative.
        initial_states: (b, d, w-1), the tokens before the first document.
        activation: None, "silu" or "swish" (the same).

    Returns (b, d, l) in x's dtype. Final states are for inference and raise `NotImplementedError`.
    """
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"activation {activation!r}: use one of None, 'silu', 'swish'")
    if return_final_states or final_states_out is not None:
        raise NotImplementedError("the CPU backend trains only: causal_conv1d_fn returns no final states")
    return CausalConv1dFn.apply(x, weight, bias, seq_idx, initial_states, activation is not None)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Inference over packed requests, which the CPU backend does not have; the name must exist to be imported."""
    raise NotImplementedError(
        f"the CPU backend trains only: no convolution states of {state_len} tokens for {len(cu_seqlens) - 1} requests "
        f"of {tuple(x.shape)}; generate with transformers from the exported checkpoint"
    )
