"""The short causal depthwise convolution in plain PyTorch: what the package `causal_conv1d` does on a GPU.

    y_t = act(bias + sum_k weight[k] * x_{t - (width-1) + k})

where tokens of another document (`seq_idx`), and tokens before the first one, count as zeros.

Shapes: b batch, l tokens, d channels, w width. Inside, tokens come before channels (b, l, d): the layout of the
projection that feeds it, and one in which a shift by a token is a slice. Arithmetic is FP32, or FP64 for FP64 inputs.
"""

from __future__ import annotations

from typing import Any

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


def foreign_tokens(seq_idx: Tensor, width: int) -> list[Tensor]:
    """For k = 0 .. width-2, (b, l, 1) true where the token width-1-k places back belongs to another document.

    Tokens before the first one are `initial_states` or zeros; they count to the first document, as in the original.
    """
    padded = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1)
    length = seq_idx.shape[1]
    return [(padded[:, k : k + length] != seq_idx).unsqueeze(-1) for k in range(width - 1)]


def taps(x: Tensor, width: int, seq_idx: Tensor | None, initial: Tensor | None) -> list[Tensor]:
    """The `width` shifted copies of x (b, l, d), oldest first, with other documents' tokens set to zero."""
    length = x.shape[1]
    head = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if initial is None else initial.to(x.dtype).transpose(1, 2)
    padded = torch.cat([head, x], 1)
    shifted = [padded[:, k : k + length] for k in range(width)]
    if seq_idx is not None:
        for k, foreign in enumerate(foreign_tokens(seq_idx, width)):
            shifted[k] = shifted[k].masked_fill(foreign, 0.0)
    return shifted


def preactivation(shifted: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """bias + sum over the taps, (b, l, d); `weight` (d, w) and `bias` (d,) in the arithmetic's dtype."""
    y = shifted[-1] * weight[:, -1]
    for k in range(len(shifted) - 1):
        y = y.addcmul_(shifted[k], weight[:, k])
    return y if bias is None else y.add_(bias)


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial: Tensor | None, silu: bool
) -> Tensor:
    """The convolution of x (b, l, d), in x's dtype. `weight` (d, w), `bias` (d,), `initial` (b, d, w-1)."""
    dtype = arithmetic(x, weight)
    shifted = taps(x.to(dtype), weight.shape[1], seq_idx, initial)
    y = preactivation(shifted, weight.to(dtype), None if bias is None else bias.to(dtype))
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial: Tensor | None,
    silu: bool,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (b, l, d), weight, bias and initial states, in the arithmetic's dtype; None for what was None."""
    dtype, width, length = arithmetic(x, weight), weight.shape[1], x.shape[1]
    w = weight.to(dtype)
    shifted = taps(x.to(dtype), width, seq_idx, initial)
    dy = dout.to(dtype)
    if silu:
        dy = silu_backward(dy, preactivation(shifted, w, None if bias is None else bias.to(dtype)))
    product = torch.empty_like(dy)  # one buffer: fresh memory costs more than the arithmetic
    dweight = torch.stack([torch.mul(dy, tap, out=product).sum((0, 1)) for tap in shifted], 1)
    dpadded = dy.new_zeros(dy.shape[0], length + width - 1, dy.shape[2])
    foreign = [] if seq_idx is None else foreign_tokens(seq_idx, width)
    for k in range(width):
        grad = torch.mul(dy, w[:, k], out=product)
        if k < len(foreign):
            grad.masked_fill_(foreign[k], 0.0)
        dpadded[:, k : k + length].add_(grad)
    dinitial = None if initial is None else dpadded[:, : width - 1].transpose(1, 2)
    return dpadded[:, width - 1 :], dweight, None if bias is None else dy.sum((0, 1)), dinitial


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
        return conv_forward(x.transpose(1, 2), weight, bias, seq_idx, initial_states, silu).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, seq_idx, initial = ctx.saved_tensors
        dx, dweight, dbias, dinitial = conv_backward(
            x.transpose(1, 2), weight, bias, seq_idx, initial, ctx.silu, grads[0].transpose(1, 2)
        )
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
