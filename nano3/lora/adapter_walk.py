"""Every adapter of this rank's part of the model, by the path that it has in the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm.mamba_block import MambaStack
from torch import nn

from nano3.targets import is_routed

EXPERT_WEIGHT = re.compile(r"\.weight(\d+)$")


@dataclass(frozen=True)
class Adapted:
    """A layer with an adapter: its path with global layer numbers, the wrapper, the layer itself, its adapter."""

    path: str
    wrapper: nn.Module
    base: Any
    adapter: Any

    @property
    def routed(self) -> bool:
        """Whether the layer is the routed experts'."""
        return is_routed(self.path)


@dataclass(frozen=True)
class Matrix:
    """A trainable tensor of an adapter, or the rows of one that belong to one expert.

    Attributes:
        name: unique in the whole model; the same on all ranks that hold a part or a replica of it.
        parameter: the tensor that this rank holds.
        row: of its first axis, where that axis counts experts; else None.
        expert: local number of the expert that it belongs to; None: of the layer's.
    """

    name: str
    parameter: nn.Parameter
    row: int | None = None
    expert: int | None = None

    @property
    def is_out(self) -> bool:
        """Whether this is a B, which starts at zero."""
        return ".linear_out." in self.name


def adapted_layers(model: nn.Module) -> Iterator[Adapted]:
    """The adapted layers of this rank in the order of the model."""
    (core,) = [module for module in model.modules() if isinstance(module, MambaModel)]
    places: list[tuple[str, nn.Module]] = []
    for name, child in core.named_children():
        if isinstance(child, MambaStack):
            places += [(f"decoder.layers.{layer.layer_number - 1}", layer) for layer in child.layers]
        else:
            places.append((name, child))
    for prefix, place in places:
        for name, module in place.named_modules():
            if hasattr(module, "adapter") and hasattr(module, "to_wrap"):
                yield Adapted(".".join(filter(None, (prefix, name))), module, module.to_wrap, module.adapter)


def matrices(layer: Adapted) -> Iterator[Matrix]:
    """The trainable tensors of one layer's adapter; one for each local expert where experts have their own."""
    for name, parameter in layer.adapter.named_parameters():
        if not parameter.requires_grad:
            continue
        full = f"{layer.path}.adapter.{name}"
        own = EXPERT_WEIGHT.search(full)
        if not layer.routed:
            yield Matrix(full, parameter)
        elif own:
            number = int(own.group(1))
            yield Matrix(_with_expert(full, number, layer), parameter, expert=number)
        elif name == "magnitude":
            for number in range(parameter.shape[0]):
                yield Matrix(_with_expert(full, number, layer), parameter, number, number)
        else:
            yield Matrix(full, parameter)


def _with_expert(name: str, local: int, layer: Adapted) -> str:
    number = parallel_state.get_expert_model_parallel_rank() * layer.base.num_gemms + local
    return f"{EXPERT_WEIGHT.sub('.weight', name)} of expert {number}"
