"""Attention over a context-parallel group: every rank's queries against the keys and values of the whole pack.

Transformer Engine passes keys and values around a ring; here they are gathered at once, with the same result. Shapes:
t positions of a rank's share (first axis), c ranks; the pack has c * t positions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nano3.cpu.te.partition import partitioned_indices


class _Gather(torch.autograd.Function):
    """(t, ...) on every rank -> (c * t, ...), rank after rank; the gradient is summed over ranks and cut again."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, share.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


class Piece(NamedTuple):
    """Queries that are neighbours in a document, and the keys that they may see."""

    queries: slice  # in this rank's share
    keys: slice  # in the whole pack: from the document's start to the last query's position

    @property
    def mask(self) -> Tensor:
        """(queries, keys) true where a query sees a key: causal, the last query sees all."""
        rows, columns = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        return torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)


class Share:
    """How one rank's share of a pack with boundaries `bounds` is computed over `group`."""

    def __init__(self, bounds: Tensor, group: dist.ProcessGroup) -> None:
        self.group, self.bounds = group, bounds.tolist()
        self.order = torch.cat(
            [partitioned_indices(bounds, self.bounds[-1], group.size(), rank) for rank in range(group.size())]
        ).argsort()

    def whole(self, share: Tensor) -> Tensor:
        """(t, ...) -> (c * t, ...) in the pack's order."""
        return _Gather.apply(share, self.group).index_select(0, self.order)

    def pieces(self) -> list[Piece]:
        """This rank's pieces in the order of its share: two of every document."""
        size, rank = self.group.size(), self.group.rank()
        found = []
        for start, stop in pairwise(self.bounds):
            length, local = (stop - start) // (2 * size), start // size
            for half, number in enumerate((rank, 2 * size - 1 - rank)):
                queries = slice(local + half * length, local + (half + 1) * length)
                found.append(Piece(queries, slice(start, start + (number + 1) * length)))
        return found
