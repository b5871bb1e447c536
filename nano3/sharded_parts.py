"""The tensors of a model that is cut over ranks, as Megatron-Core's checkpoints name and place them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def parts_of(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    """Every tensor of this rank; `data` is the tensor itself."""
    for entry in model.sharded_state_dict(prefix="").values():  # type: ignore[operator]
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(part, ShardedTensor):
                yield part


def place(part: ShardedTensor) -> tuple[Any, ...]:
    """Index of a part in its whole tensor: numbers for prepended axes, slices for the rest."""
    ahead = part.prepend_axis_num
    lengths = zip(part.global_offset[ahead:], part.local_shape, strict=True)
    return (*part.global_offset[:ahead], *(slice(start, start + length) for start, length in lengths))
