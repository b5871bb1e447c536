"""Which positions of a packed sequence each context-parallel rank holds.

The rule of `transformer_engine_torch.thd_get_partitioned_indices`, in PyTorch: every *document* is cut into 2 * cp
pieces of equal length, and rank r holds pieces r and 2 * cp - 1 - r of each: an early and a late one, so that causal
attention costs every rank the same. A rank's share is its pieces of the first document, then of the second, and so on.
`nano3/context_parallel.py` takes it on a GPU too; `make gpu-check` compares it with the original there.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def partitioned_indices(cu_seqlens: Tensor, total_tokens: int, cp_size: int, rank: int) -> Tensor:
    """Positions of the pack that `rank` holds, in its order: (total_tokens / cp_size,) int32.

    The rule of `thd_get_partitioned_indices` in Transformer Engine (context_parallel.cu, thd_partition_indices_kernel):
    with the boundaries divided by `cp_size`, a local position in the first half of its document's share belongs to
    piece `rank`, one in the second half to piece 2 * cp_size - 1 - rank.

    Args:
        cu_seqlens: (documents + 1,) int32 boundaries from 0 to `total_tokens`, all multiples of 2 * cp_size.
        total_tokens: positions of the whole pack.
        cp_size: ranks that share the pack.
        rank: among them.

    Raises:
        ValueError: boundaries that do not fit.
    """
    _check(cu_seqlens, total_tokens, cp_size)
    starts = cu_seqlens.long() // cp_size
    local = torch.arange(total_tokens // cp_size, device=cu_seqlens.device)
    document = torch.searchsorted(starts, local, right=True) - 1
    start, piece = starts[document], starts.diff()[document] // 2
    within = local - start
    offset = torch.where(within < piece, rank, 2 * (cp_size - 1) - rank)
    return (within + start * cp_size + piece * offset).int()


def _check(cu_seqlens: Tensor, total_tokens: int, cp_size: int) -> None:
    bounds, multiple = cu_seqlens.tolist(), 2 * cp_size
    if bounds[0] != 0 or bounds[-1] != total_tokens:
        raise ValueError(f"cu_seqlens run from {bounds[0]} to {bounds[-1]}, the pack has {total_tokens} positions")
    for number, (start, stop) in enumerate(pairwise(bounds)):
        if (stop - start) % multiple:
            raise ValueError(
                f"document {number} of the pack has {stop - start} positions, which are no 2 * cp = {multiple} equal "
                f"pieces; pack with --pad-multiple {multiple}"
            )
