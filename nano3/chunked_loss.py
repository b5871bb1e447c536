"""The loss in chunks of positions, so that the logits of a pack never exist as a whole.

A token's loss depends on its own hidden state alone. So its gradient is the gradient of a loss that counts once, times
the weight that arrives in the backward pass. The first factor is made in the forward pass, while a chunk's logits are
there. Nothing is computed twice, and what is kept is as large as the hidden states.

Shapes: s positions of a pack on a context-parallel rank, c of them in a chunk, b = 1 packs, h the hidden size, v this
rank's part of the vocabulary. Under sequence parallelism a tensor-parallel rank has s / tp of the hidden states.
Losses are (b, s), as Megatron-Core's. Call `nano3.cpu.enable()` before importing this where there may be no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.models.mamba import MambaModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from nano3.cli import UserError


def install_chunked_loss(model: MambaModel, positions: int) -> None:
    """Lets the last stage's model compute its losses `positions` at a time; 0: all at once, as Megatron-Core does.

    Without labels the model gives all logits, as before.
    """
    if positions and model.post_process:
        model.forward = partial(_forward, model, model.forward, positions)


def _forward(
    model: MambaModel,
    forward: Callable,
    positions: int,
    *inputs: Any,
    labels: torch.Tensor | None = None,
    **settings: Any,
) -> torch.Tensor:
    """The model's `forward`: losses (b, s) of labels (b, s), or logits (b, s, v) without them."""
    if labels is None:
        return forward(*inputs, **settings)
    model.post_process = False  # Megatron-Core's forward pass then ends with the hidden states
    try:
        hidden = forward(*inputs, **settings)
    finally:
        model.post_process = True
    learning = torch.is_grad_enabled()
    if learning and any(parameter.requires_grad for parameter in model.output_layer.parameters()):
        raise UserError(
            "train.loss_chunk computes no gradient for the output layer, and something in it learns; "
            "give train.loss_chunk=0 or leave output_layer out of lora.targets"
        )
    return _ChunkedLoss.apply(hidden, labels, model, positions, learning and hidden.requires_grad)


class _ChunkedLoss(torch.autograd.Function):
    """Hidden states, (s / tp, b, h) or (s, b, h), to losses (b, s). Keeps a gradient as large as the hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, model: MambaModel, positions: int, learns: bool
    ) -> torch.Tensor:
        layer = model.output_layer
        ctx.group, ctx.scattered = layer.tp_group, layer.sequence_parallel
        whole = gather_from_sequence_parallel_region(hidden, group=ctx.group) if ctx.scattered else hidden
        with _without_exchange(layer):
            losses, gradient = chunk_by_chunk(model, whole, labels, positions, learns)
        if gradient is not None:  # so far of this rank's part of the vocabulary
            if ctx.scattered:
                gradient = reduce_scatter_to_sequence_parallel_region(gradient, group=ctx.group)
            else:
                gradient = reduce_from_tensor_model_parallel_region(gradient, group=ctx.group)
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        weights = grads[0].transpose(0, 1)[..., None]  # (s, b, 1)
        if ctx.scattered:
            weights = weights.chunk(ctx.group.size())[ctx.group.rank()]
        (gradient,) = ctx.saved_tensors
        return (gradient * weights).to(gradient.dtype), None, None, None, None


def chunk_by_chunk(
    model: MambaModel, hidden: torch.Tensor, labels: torch.Tensor, positions: int, learns: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (b, s) of hidden states (s, b, h) and labels (b, s), and where it `learns` the gradient of their sum.

    Output layer and loss are the model's own, hooks included: they mask padded vocabulary, turn logits to FP32, and
    judge what is predicted.
    """
    losses, gradient = [], torch.empty_like(hidden) if learns else None
    for first in range(0, len(hidden), positions):
        here = slice(first, first + positions)
        with torch.set_grad_enabled(learns):
            part = hidden[here].detach().requires_grad_(learns)
            # No name for the logits: they must be gone before their gradient is made.
            loss = model.compute_language_model_loss(labels[:, here], model.output_layer(part)[0])
            if gradient is not None:
                (gradient[here],) = torch.autograd.grad(loss.sum(), part)
        losses.append(loss.detach())
    return torch.cat(losses, 1), gradient


@contextmanager
def _without_exchange(layer: torch.nn.Module) -> Iterator[None]:
    """The output layer takes a whole sequence, and leaves its input's gradient this rank's part of a sum."""
    during = {"sequence_parallel": False, "allreduce_dgrad": False, "disable_grad_reduce": True}
    before = {name: getattr(layer, name) for name in during}
    vars(layer).update(during)
    try:
        yield
    finally:
        vars(layer).update(before)
