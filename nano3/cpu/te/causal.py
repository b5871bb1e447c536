"""Causal attention on a CPU: PyTorch's fused forward, and a backward of our own, which is faster than PyTorch's.

Shapes: s tokens, b batch, h heads, g groups (h/g heads share keys and values), d head width; inside, n = b*g.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nano3.cpu.arrays import array
from nano3.cpu.te.causal_loops import causal_backward


class CausalAttention(torch.autograd.Function):
    """Query (s, b, h, d), key and value (s, b, g, d), scale -> (s, b, h, d).

    Saves query, key, value, output and log-sum-exp (b, h, s), as flash attention does.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        out = out.permute(2, 0, 1, 3)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32)
        dout = grads[0].to(dtype)
        lse = lse.to(dtype).permute(2, 0, 1).unsqueeze(-1) / math.log(2)
        delta = (dout * out).sum(-1, keepdim=True)
        rows = (query.to(dtype) * (ctx.scale / math.log(2)), key.to(dtype), value.to(dtype), dout, lse, delta)
        q, k, v, do, lse, delta = (by_group(t, key.shape[2]) for t in rows)
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        per_row = (q, k, v, do, lse.squeeze(-1), delta.squeeze(-1), dq, dk, dv)
        for arrays in zip(*(array(t) for t in per_row), strict=True):
            causal_backward(*arrays)
        dq, dk = dq.mul_(ctx.scale), dk.mul_(math.log(2))
        return *(by_token(t, like) for t, like in ((dq, query), (dk, key), (dv, value))), None


def by_group(tensor: Tensor, groups: int) -> Tensor:
    """(s, b, h or g, d) -> (n, s * heads of a group, d), contiguous."""
    s, b, heads, d = tensor.shape
    parts = tensor.unflatten(2, (groups, heads // groups)).permute(1, 2, 0, 3, 4)
    return parts.reshape(b * groups, s * (heads // groups), d).contiguous()


def by_token(tensor: Tensor, like: Tensor) -> Tensor:
    """Undoes `by_group`, into the shape and dtype of `like`."""
    s, b, heads, d = like.shape
    groups = tensor.shape[0] // b
    return tensor.view(b, groups, s, heads // groups, d).permute(2, 0, 1, 3, 4).reshape(like.shape).to(like.dtype)
