"""Causal attention: PyTorch's fused forward, and a backward of our own, faster than PyTorch's.

PyTorch's fused backward sums the gradients of keys and values by products whose result is as narrow as a head, which
reach half of a core's rate. Here the results are transposed, a head high and a block of keys wide, and the queries of
all heads that share a key take part in one product. -log-sum-exp and -sum(dout * out) are a further column of queries
and of the output's gradient, against a column of ones: the products subtract them.

Shapes: s tokens, b batch, h heads, g groups (h/g heads share keys and values), d head width; inside, n = b*g, a row for
every token and head of a group, r = h/g rows a token.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KEYS, ROWS = 128, 1024
"""A block of scores: with its gradient, 1 MB, it fits into a core's second cache."""


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
        groups, width = key.shape[2:]
        dtype = torch.promote_types(query.dtype, torch.float32)
        dout = grads[0].to(dtype)
        per_exponent = ctx.scale / math.log(2)
        lse = lse.to(dtype).permute(2, 0, 1).unsqueeze(-1) / -math.log(2)
        q = by_group(query.to(dtype) * per_exponent, lse, groups)
        do = by_group(dout, (dout * out).sum(-1, keepdim=True).neg_(), groups)
        k, v = (F.pad(by_group(t.to(dtype), None, groups), (0, 1), value=1.0) for t in (key, value))
        dq = torch.zeros_like(q[..., :width], memory_format=torch.contiguous_format)
        dk, dv = (torch.empty_like(dq[:, : k.shape[1]]) for _ in range(2))
        for n in range(len(q)):
            _backward(q[n], k[n], v[n], do[n], dq[n], dk[n], dv[n])
        dq, dk = dq.mul_(ctx.scale), dk.mul_(math.log(2))
        return *(by_token(t, like) for t, like in ((dq, query), (dk, key), (dv, value))), None


def by_group(tensor: Tensor, column: Tensor | None, groups: int) -> Tensor:
    """(s, b, h or g, d) -> (n, s * heads of a group, d), contiguous; `column` (s, b, h, 1) is put behind the last."""
    s, b, heads, _ = tensor.shape
    parts = [tensor] if column is None else [tensor, column]
    parts = [t.unflatten(2, (groups, heads // groups)).permute(1, 2, 0, 3, 4) for t in parts]
    return torch.cat(parts, -1).reshape(b * groups, s * (heads // groups), -1)


def by_token(tensor: Tensor, like: Tensor) -> Tensor:
    """Undoes `by_group`, into the shape and dtype of `like`."""
    s, b, heads, d = like.shape
    groups = tensor.shape[0] // b
    return tensor.view(b, groups, s, heads // groups, d).permute(2, 0, 1, 3, 4).reshape(like.shape).to(like.dtype)


def _backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """One group: q, do (s*r, d+1), k, v (s, d+1); fills dk, dv (s, d) and adds to dq (s*r, d).

    q comes in units of log2 and so do the exponents; dk leaves without the factor ln 2, dq without the scale.
    """
    (tokens, width), rows = dk.shape, len(q)
    r = rows // tokens
    unseen = torch.full((KEYS, KEYS), float("-inf"), dtype=q.dtype).triu(1).repeat_interleave(r, 0)
    buffers = q.new_empty(2, (ROWS + KEYS * r) * KEYS)
    for start in range(0, tokens, KEYS):
        stop = min(start + KEYS, tokens)
        keys = stop - start
        k_block, v_block = k[start:stop], v[start:stop]
        k_across, v_across, k_plain = k_block.t(), v_block.t(), k_block[:, :width].contiguous()
        dk_across, dv_across = q.new_zeros(2, width, keys)
        # The first rows are those of the block's own tokens, of which each sees the keys up to itself: the mask is
        # theirs, in one piece, however many heads share a key.
        first = min(max(start * r + ROWS, stop * r), rows)
        for top, bottom in pairwise([start * r, *range(first, rows, ROWS), rows]):
            scores, dscores = buffers[:, : (bottom - top) * keys].view(2, bottom - top, keys)
            q_rows, do_rows = q[top:bottom], do[top:bottom]
            torch.mm(q_rows, k_across, out=scores)
            if top == start * r:
                scores[: keys * r].add_(unseen[: keys * r, :keys])
            scores.exp2_()
            dv_across.addmm_(do_rows[:, :width].t(), scores)
            torch.mm(do_rows, v_across, out=dscores).mul_(scores)
            dk_across.addmm_(q_rows[:, :width].t(), dscores)
            dq[top:bottom].addmm_(dscores, k_plain)
        dk[start:stop], dv[start:stop] = dk_across.t(), dv_across.t()
