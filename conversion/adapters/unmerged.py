"""The tuned model as training had it: base weights in plain transformers, and the adapter beside them, not merged.

    y = W x + scale * B (A x)

in FP32 for every adapted matrix, the routed experts' too. What the merge adds to the tuned model's answers, and what it
loses when it rounds to BF16 or drops something, shows in the difference between this and the merged folder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from conversion.adapters.adapter_folder import Adapter, Contribution
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.reference_linears import tap_model


def with_adapter(adapter: Path, base: Path) -> Callable[[Any], None]:
    """What puts the adapter beside the weights of a reference model of `base`.

    Raises `UserError` for an adapter that is more than added low-rank products: DoRA's, one of the vocabulary, and one
    whose training moved the routers' biases.
    """
    found = Adapter(adapter, Arch.load(base))
    parts = found.contributions()
    vocabulary = [name for name in parts if not name.startswith("backbone.layers.")]
    if found.info.dora or vocabulary or found.router_biases():
        raise UserError(f"{adapter} is not a plain LoRA adapter of the layers' matrices; score the merged model alone")
    return partial(tap_model, before={}, after={_module(name): _added(found, parts[name]) for name in parts})


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _added(adapter: Adapter, parts: list[Contribution]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Input and output of one matrix -> the output with the adapter's part of it."""
    factors = []
    for part in parts:
        low, high, _ = adapter.factors(part.path, part.expert)
        rows = slice(part.start, part.start + part.count)
        factors.append((rows, low, adapter.sizes[part.path].scale * high[part.first : part.first + part.count]))

    def add(value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for rows, low, high in factors:
            output[..., rows] += linear(linear(value, low.to(value)), high.to(value))
        return output

    return add
