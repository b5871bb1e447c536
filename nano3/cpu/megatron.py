"""Where Megatron-Core 0.16.1 needs another answer than a wrapped factory can give.

Two places decide by `Tensor.is_cuda`; gloo gathers and scatters equal parts only, while expert tensor parallelism
exchanges as many tokens as each rank has; and two functions rely on a GPU's fused kernels for their speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nano3.cpu import row_loops
from nano3.cpu.arrays import array


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


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Their values as compiled loops take them: contiguous, FP32 or FP64."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)).contiguous() for t in tensors]


class _SquaredReLU(torch.autograd.Function):
    """relu(x)², which saves relu(x)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        (wide,) = _wide(x)
        positive, out = torch.empty_like(wide), torch.empty_like(wide)
        row_loops.squared_relu(*(array(t.view(-1)) for t in (wide, positive, out)))
        ctx.save_for_backward(positive.to(x.dtype))
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (positive,) = ctx.saved_tensors
        dout, wide = _wide(grads[0], positive)
        dx = torch.empty_like(wide)
        row_loops.squared_relu_backward(*(array(t.view(-1)) for t in (dout, wide, dx)))
        return dx.to(positive.dtype)


def _weighted_squared_relu(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """relu(x)² * weights: x (tokens, width), weights (tokens, 1)."""
    wide, factors = _wide(x, weights.flatten())
    out = torch.empty_like(wide)
    row_loops.weighted_squared_relu(*(array(t) for t in (wide, factors, out)))
    return out.to(x.dtype)


def _weighted_squared_relu_back(
    g: torch.Tensor, x: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Its gradients with respect to x and weights."""
    dout, wide, factors = _wide(g, x, weights.flatten())
    dx, dweights = torch.empty_like(wide), torch.empty_like(factors)
    row_loops.weighted_squared_relu_backward(*(array(t) for t in (dout, wide, factors, dx, dweights)))
    return dx.to(x.dtype), dweights.view(weights.shape).to(weights.dtype)


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Megatron-Core's, which torch.compile makes one kernel of on a GPU."""
    return _SquaredReLU.apply(x)


def _sort_chunks(function: Callable[..., Any]) -> Callable[..., Any]:
    """`sort_chunks_by_idxs` that copies nothing where the chunks are in order, as on a rank that has all experts."""

    @functools.wraps(function)
    def sort(
        input: torch.Tensor,
        split_sizes: torch.Tensor,
        sorted_idxs: torch.Tensor,
        probs: torch.Tensor | None = None,
        fused: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if sorted_idxs.tolist() == list(range(len(sorted_idxs))):
            return input, probs
        return function(input, split_sizes, sorted_idxs, probs=probs, fused=fused)

    return sort


def install() -> None:
    """Replaces the functions where Megatron-Core looks them up."""
    from megatron.core import activations
    from megatron.core.fusions import fused_weighted_squared_relu
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import experts, moe_utils, token_dispatcher

    mappings._gather_along_first_dim = _gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter(mappings._reduce_scatter_along_first_dim)

    moe_utils.maybe_move_tensor_to_cpu = _to_host
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
    token_dispatcher.sort_chunks_by_idxs = _sort_chunks(token_dispatcher.sort_chunks_by_idxs)
    for module in (activations, experts):
        module.squared_relu = _squared_relu
    fused_weighted_squared_relu.weighted_squared_relu = _weighted_squared_relu
    fused_weighted_squared_relu.weighted_squared_relu_back = _weighted_squared_relu_back
