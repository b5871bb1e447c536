"""The two places where Megatron-Core 0.16.1 decides by `Tensor.is_cuda`, which no wrapped factory can answer."""

from __future__ import annotations

from typing import Any

import torch


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`maybe_move_tensor_to_cpu`: the alltoall dispatcher wants NumPy counts, also for tensors that are on the CPU."""
    del record_stream  # there is no stream to record
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def install() -> None:
    """Replaces `maybe_move_tensor_to_cpu` where the token dispatchers look it up."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.maybe_move_tensor_to_cpu = _to_host
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
