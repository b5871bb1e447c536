"""Ranks that hold the same part of a tensor must hold the same bits: compared by digest before anything is saved.

A forgotten reduction lets replicas drift apart without an error: each rank goes on, and the checkpoint keeps one of
them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from nano3.cli import UserError

Place = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Key, global offset and shape of a rank's part of a tensor."""


def digests(state: dict[str, Any]) -> dict[Place, str]:
    """SHA-256 of every part that this rank holds of a sharded state, which stays as it is."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    flat = dict(state)
    apply_factories(flat)
    return {
        (entry.key, tuple(entry.global_offset), tuple(entry.local_shape)): _digest(entry.data)
        for entry in nested_values(flat)
        if isinstance(entry, ShardedTensor)
    }


def _digest(tensor: torch.Tensor) -> str:
    bits = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().data).hexdigest()


def disagreements(held: list[dict[Place, str]]) -> list[str]:
    """What ranks hold differently, `held` by rank: each such tensor, and which ranks agree on it."""
    versions: dict[Place, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, places in enumerate(held):
        for place, digest in places.items():
            versions[place][digest].append(rank)
    return [
        f"{key} (ranks alike: {' | '.join(', '.join(map(str, ranks)) for ranks in sorted(by_digest.values()))})"
        for (key, *_), by_digest in versions.items()
        if len(by_digest) > 1
    ]


def require_equal_replicas(state: dict[str, Any], what: str) -> None:
    """Raises `UserError` on every rank when two ranks differ in a part of `state` that both hold.

    All ranks must call it. `what` is the thing that would have been saved.
    """
    held: list[dict[Place, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(held, digests(state))
    found = disagreements(held)
    if found:
        raise UserError(
            f"{what}: {len(found)} tensors differ between ranks that must hold the same, and nothing is saved: "
            f"{'; '.join(found[:5])}. A reduction is missing or a device computes wrongly; resume from the checkpoint "
            "before, on other hardware if it happens again"
        )
