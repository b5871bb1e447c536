"""Copies of a trained parameter on ranks that hold slices of the same experts get the same gradient, bit for bit.

Under expert tensor parallelism (ETP) some matrices of experts' adapters are whole on every rank of the group. Each
copy's gradient is summed over a data-parallel group of its own, and two communicators may add in another order. Adam
keeps such a last bit, replicas differ, and no checkpoint would be saved (`nano3.checkpoints.replicas`). Ranks under
tensor parallelism have no such copies: Megatron-Core sums theirs over the tensor-parallel group last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

MARK = "copied_over_etp"
"""Attribute of a parameter that every rank of the ETP group has whole."""


def then_equal_copies(finalize: Callable[..., None]) -> Callable[..., None]:
    """Megatron-Core's `finalize_model_grads`, behind which the first rank's gradients become those of its group."""

    def run(model: list[nn.Module], *arguments: Any, **options: Any) -> None:
        finalize(model, *arguments, **options)
        group = parallel_state.get_expert_tensor_parallel_group()
        if group.size() == 1:
            return
        for chunk in model:
            for parameter in chunk.parameters():
                if getattr(parameter, MARK, False):
                    # With the distributed optimizer only this rank's shard is a sum: the same shard on all of them.
                    dist.broadcast(parameter.main_grad, group=group, group_src=0)  # type: ignore[attr-defined]

    return run
