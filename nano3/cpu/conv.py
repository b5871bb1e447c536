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


def find_edges(ids: Tensor, batch: int, width: int) -> Edges | None:
    """From the document numbers of the padded input, (b or 1, l + w - 1); None where no tap is foreign."""
    foreign = ids.unfold(1, width, 1) != ids[:, width - 1 :].unsqueeze(-1)
    rows = foreign.any(-1).expand(batch, -1).nonzero()
    if not len(rows):
        return None
    offsets = torch.arange(width, device=ids.device)
    foreign = foreign.expand(batch, -1, -1)
    return Edges(rows[:, :1], rows[:, 1:] + offsets, foreign[rows[:, 0], rows[:, 1]].unsqueeze(-1))


def with_context(x: Tensor, context: int, initial: Tensor | None = None) -> Tensor:
    """(b, l, d) -> (b, context + l, d): the tokens before the first, zeros without `initial` (b, d, context)."""
    before = x.new_zeros(x.shape[0], context, x.shape[2]) if initial is None else initial.to(x.dtype).transpose(1, 2)
    return torch.cat([before, x], 1)


def ids_with_context(seq_idx: Tensor | None, context: int) -> Tensor | None:
    """(b, l) -> (b, context + l): what stands before the first token is of its document."""
    return None if seq_idx is None else torch.cat([seq_idx[:, :1].expand(-1, context), seq_idx], 1)


class Convolution:
    """One convolution and what its backward needs.

    `padded` (b, w-1 + l, d) has the w-1 tokens before the first one too, and `ids` (b, w-1 + l) their documents, or is
    None for one document. `weight` (d, w), `bias` (d,). All tokens but the few at document edges are computed without
    looking at documents, as shifts of the whole input; those at edges one by one, with their taps.
    """

    def __init__(self, padded: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor | None, silu: bool) -> None:
        dtype = arithmetic(padded, weight)
        width = weight.shape[1]
        self.dtype, self.length, self.silu = padded.dtype, padded.shape[1] - width + 1, silu
        self.weight = weight.to(dtype).t().contiguous()  # (w, d): rows, not columns, or PyTorch does not vectorize
        self.padded = padded.to(dtype)
        self.edges = None if ids is None else find_edges(ids, padded.shape[0], width)
        if bias is None:
            y = self.shifted(0) * self.weight[0]
        else:
            y = torch.addcmul(bias.to(dtype), self.shifted(0), self.weight[0])
        for k in range(1, width):
            y.addcmul_(self.shifted(k), self.weight[k])
        if self.edges is not None:
            at_edges = (self.edge_taps(self.edges) * self.weight).sum(1)
            y[self.edges.token] = at_edges if bias is None else at_edges + bias.to(dtype)
        self.preactivation = y

    def shifted(self, k: int) -> Tensor:
        """Tap k of every token, (b, l, d), the oldest first."""
        return self.padded[:, k : k + self.length]

    def edge_taps(self, edges: Edges) -> Tensor:
        """The taps of the tokens at edges (r, w, d), with other documents' set to zero."""
        return self.padded[edges.batch, edges.taps].masked_fill_(edges.foreign, 0.0)

    def output(self) -> Tensor:
        """(b, l, d) in the input's dtype."""
        return (F.silu(self.preactivation) if self.silu else self.preactivation).to(self.dtype)

    def backward(self, dout: Tensor, parameters: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the padded input (b, w-1 + l, d) and, where `parameters` are trained, of weight (d, w) and bias.

        In the arithmetic's dtype.
        """
        dy = dout.to(self.weight.dtype)
        dy = silu_backward(dy, self.preactivation) if self.silu else dy.clone()
        dbias = dy.sum((0, 1)) if parameters else None
        dpadded = torch.empty(self.padded.shape, dtype=dy.dtype, device=dy.device)
        dweight = torch.zeros_like(self.weight) if parameters else None
        dtaps = None
        if self.edges is not None:
            dedge = dy[self.edges.token].unsqueeze(1)  # (r, 1, d)
            dy[self.edges.token] = 0.0
            if dweight is not None:
                dweight += (dedge * self.edge_taps(self.edges)).sum(0)
            dtaps = (dedge * self.weight).masked_fill_(self.edges.foreign, 0.0)
        torch.mul(dy, self.weight[0], out=dpadded[:, : self.length])
        dpadded[:, self.length :] = 0.0
        for k in range(1, self.weight.shape[0]):
            dpadded[:, k : k + self.length].addcmul_(dy, self.weight[k])
        if self.edges is not None and dtaps is not None:
            dpadded.index_put_((self.edges.batch.expand_as(self.edges.taps), self.edges.taps), dtaps, accumulate=True)
        if dweight is not None:
            product = torch.empty_like(dy)  # one buffer: fresh memory costs more than the arithmetic
            for k in range(self.weight.shape[0]):
                dweight[k] += torch.mul(dy, self.shifted(k), out=product).sum((0, 1))
        return dpadded, None if dweight is None else dweight.t(), dbias


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
        return CausalConv1dFn.convolution(x, weight, bias, seq_idx, initial_states, silu).output().transpose(1, 2)

    @staticmethod
    def convolution(
        x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial: Tensor | None, silu: bool
    ) -> Convolution:
        context = weight.shape[1] - 1
        padded = with_context(x.transpose(1, 2), context, initial)
        return Convolution(padded, ids_with_context(seq_idx, context), weight, bias, silu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, seq_idx, initial = ctx.saved_tensors
        convolution = CausalConv1dFn.convolution(x, weight, bias, seq_idx, initial, ctx.silu)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dpadded, dweight, dbias = convolution.backward(grads[0].transpose(1, 2), trained)
        dbefore, dx = dpadded.transpose(1, 2).split([weight.shape[1] - 1, x.shape[2]], -1)
        return (
            dx.to(x.dtype),
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None or bias is None else dbias.to(bias.dtype),
            None,
            None if initial is None else dbefore.to(initial.dtype),
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
