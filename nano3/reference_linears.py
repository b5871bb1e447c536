"""Reaches into the linear layers of transformers' Nemotron-H: what goes into one, what comes out of it. Torch only.

Layers are named as on disk, `backbone.layers.3.mixer.q_proj`, and routed experts one by one,
`backbone.layers.1.mixer.experts.5.up_proj`, although transformers keeps those of a layer in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

Before = Callable[[torch.Tensor], torch.Tensor]
"""Input of a linear layer (..., in) -> what it gets instead."""

After = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Its input (..., in) and output (..., out) -> what it gives instead."""


def tap_model(model: Any, before: Mapping[str, Before], after: Mapping[str, After]) -> None:
    """Changes inputs and outputs of the linear layers named, in every layer of a transformers model, for good.

    Raises `ValueError` for a name that the model does not have.
    """
    found: set[str] = set()
    for number, layer in enumerate(model.get_decoder().layers):
        found |= tap_layer(layer, number, before, after)
    unknown = sorted({*before, *after} - found)
    if unknown:
        raise ValueError(f"{len(unknown)} linear layers are not in this model, first {unknown[0]}")


def tap_layer(layer: Any, number: int, before: Mapping[str, Before], after: Mapping[str, After]) -> set[str]:
    """The same for one layer, the `number`th of its model; returns the names of all linear layers in it."""
    prefix, found = f"backbone.layers.{number}.", set()
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            found.add(prefix + name)
            _tap(module, before.get(prefix + name), after.get(prefix + name))
    experts = getattr(layer.mixer, "experts", None)
    if experts is not None:
        names = {f"{n}.{part}" for n in range(experts.num_experts) for part in ("up_proj", "down_proj")}
        prefix += "mixer.experts."
        found |= {prefix + name for name in names}
        if any(prefix + name in table for name in names for table in (before, after)):
            experts.forward = partial(_experts, experts, prefix, before, after)
    return found


def _tap(module: nn.Linear, before: Before | None, after: After | None) -> None:
    """Hooks for both; `after` sees the input as it was before `before` changed it."""
    forward = module.forward

    def tapped(value: torch.Tensor) -> torch.Tensor:
        output = forward(before(value) if before else value)
        return after(value, output) if after else output

    if before or after:
        module.forward = tapped  # type: ignore[assignment,method-assign]


def _experts(
    experts: Any,
    prefix: str,
    before: Mapping[str, Before],
    after: Mapping[str, After],
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers' routed experts compute, expert by expert.

    `hidden` (tokens, hidden), `chosen` and `weights` (tokens, experts per token) -> (tokens, hidden).
    """
    result = torch.zeros_like(hidden, dtype=weights.dtype)

    def project(name: str, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        output = linear(before[name](value) if name in before else value, weight)
        return after[name](value, output) if name in after else output

    for expert in chosen.unique().tolist():
        token, place = (chosen == expert).nonzero(as_tuple=True)
        inner = project(f"{prefix}{expert}.up_proj", hidden[token], experts.up_proj[expert])
        output = project(f"{prefix}{expert}.down_proj", experts.act_fn(inner), experts.down_proj[expert])
        result.index_add_(0, token, (output * weights[token, place, None]).to(result.dtype))
    return result.to(hidden.dtype)
