"""RMS norm over groups of a row's channels, and its way back: what the norms of both libraries share.

On a CPU compiled loops do it (`row_loops.py`), on any other device PyTorch. Shapes: x (..., d), d = g * w; weight (d,);
rstd, which is 1 / sqrt(mean of x² + eps), (..., g). All of one dtype, FP32 or FP64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nano3.cpu.arrays import array, rows


def normalize(x: Tensor, weight: Tensor, eps: float, width: int) -> tuple[Tensor, Tensor]:
    """x * rstd * weight, and rstd."""
    if x.device.type != "cpu":
        return plain(x, weight, eps, width)
    from nano3.cpu import row_loops

    out, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(*x.shape[:-1], x.shape[-1] // width, dtype=x.dtype)
    factors = array(rstd.view(-1, rstd.shape[-1]))
    row_loops.normalize(rows(x, width), rows(weight, width)[0], eps, factors, rows(out, width))
    return out, rstd


def normalize_backward(dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x."""
    if x.device.type != "cpu":
        return plain_backward(dout, x, weight, rstd)
    from nano3.cpu import row_loops

    width, dx = x.shape[-1] // rstd.shape[-1], torch.empty(x.shape, dtype=x.dtype)
    inputs = (rows(dout, width), rows(x, width), rows(weight, width)[0], array(rstd.view(-1, rstd.shape[-1])))
    row_loops.normalize_backward(*inputs, rows(dx, width))
    return dx


def plain(x: Tensor, weight: Tensor, eps: float, width: int) -> tuple[Tensor, Tensor]:
    """`normalize` in PyTorch's operations."""
    grouped = x.unflatten(-1, (-1, width))
    rstd = grouped.square().mean(-1).add_(eps).rsqrt_()
    return (grouped * rstd.unsqueeze(-1)).flatten(-2) * weight, rstd


def plain_backward(dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """`normalize_backward` in PyTorch's operations."""
    groups, factor = (rstd.shape[-1], -1), rstd.unsqueeze(-1)
    u, grouped = (dout * weight).unflatten(-1, groups), x.unflatten(-1, groups)
    along = (u * grouped).mean(-1, keepdim=True) * factor**3
    return (u * factor - grouped * along).flatten(-2)


def normalized(x: Tensor, rstd: Tensor) -> Tensor:
    """x * rstd: what the weight is multiplied with."""
    return (x.unflatten(-1, (rstd.shape[-1], -1)) * rstd.unsqueeze(-1)).flatten(-2)
