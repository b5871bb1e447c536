"""Where Megatron-Core 0.16.1 needs another answer than a wrapped factory can give.

Two places decide by `Tensor.is_cuda`; and gloo gathers and scatters equal parts only, while expert tensor parallelism
exchanges as many tokens as each rank has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`maybe_move_tensor_to_cpu`: the alltoall dispatcher wants NumPy counts, also for tensors that are on the CPU."""
    del record_stream  # there is no stream to record
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`_gather_along_first_dim` that pads unequal parts to the longest, and cuts them again."""

    @functools.wraps(function)
    def gather(
        part: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return function(part, group, use_global_buffer=use_global_buffer)
        longest = max(output_split_sizes)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gather


def _reduce_scatter(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`_reduce_scatter_along_first_dim` that sums all of unequal parts, and keeps its own."""

    @functools.wraps(function)
    def reduce_scatter(
        whole: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return function(whole, group, use_global_buffer=use_global_buffer)
        total = whole.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    return reduce_scatter


def install() -> None:
    """Replaces the functions where Megatron-Core looks them up."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    mappings._gather_along_first_dim = _gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter(mappings._reduce_scatter_along_first_dim)

    moe_utils.maybe_move_tensor_to_cpu = _to_host
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
