"""out + scale * (x @ Aᵀ) @ Bᵀ: how an adapter's delta gets into its layer's output.

NeMo multiplies a delta as wide as the layer by the scale and then adds it, two passes over memory in forward and one in
backward beside the product. Here the product adds, and the scale is multiplied where the delta is as wide as its rank.
"""

from __future__ import annotations

from typing import Any

import torch

from nano3.cpu.products import product


class _Projected(torch.autograd.Function):
    """Saves the input and A."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, low)
        return product(x, low)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, low = ctx.saved_tensors
        dx = product(grads[0], low.t()) if ctx.needs_input_grad[0] else None
        dlow = torch.mm(grads[0].flatten(0, -2).t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, dlow


def projected(x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """(..., in) times A (rank, in) transposed: (..., rank)."""
    return _Projected.apply(x, low)


class _AddProduct(torch.autograd.Function):
    """Saves low and high. The gradient of `out` is the one that arrives, not a copy."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(low, high)
        ctx.scale = scale
        columns = high.t()
        if out.device.type != "cpu":  # Transformer Engine may keep its output, or have it in a buffer of its own
            return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), columns, alpha=scale).view(out.shape)
        # view, never a copy: the product would be added to that and lost
        out.view(-1, out.shape[-1]).addmm_(low.flatten(0, -2), columns, alpha=scale)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        low, high = ctx.saved_tensors
        rows = grads[0].flatten(0, -2)
        dlow = dhigh = None
        if ctx.needs_input_grad[1]:
            dlow = product(rows, high.t()).mul_(ctx.scale).view(low.shape)
        if ctx.needs_input_grad[2]:
            dhigh = torch.mm(low.flatten(0, -2).t(), rows).mul_(ctx.scale).t()  # rank-high products are the faster ones
        return grads[0], dlow, dhigh, None


def add_product(out: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scale: float) -> torch.Tensor:
    """(..., out) + scale * (..., rank) @ (out, rank)ᵀ, rounded once. On a CPU it overwrites `out`, which must be no
    view: a layer's fresh output, that nobody has saved."""
    return _AddProduct.apply(out, low, high, scale)
