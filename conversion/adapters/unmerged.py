"""The tuned model as training had it: base weights in plain transformers, and the adapter beside them, not merged.

    y = W x + scale * B (A x)

in FP32 for every adapted matrix, the routed experts' too. What the merge adds to the tuned model's answers, and what it
loses when it rounds to BF16 or drops something, shows in the difference between this and the merged folder. An adapter
that waits for a mark (`nano3.gate`) is switched on there while the model writes; the cache of earlier tokens stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from conversion.adapters.adapter_folder import Adapter, Contribution
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.gate import Gate, open_positions
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
    gate = _WritingGate(found.info.mark) if found.info.mark else None
    after = {_module(name): _added(found, parts[name], gate) for name in parts}

    def prepare(model: Any) -> None:
        tap_model(model, {}, after)
        if gate is not None:
            model.register_forward_pre_hook(gate.see, with_kwargs=True)

    return prepare


class _WritingGate(Gate):
    """A gate that follows a transformers model while it reads and writes rows of tokens.

    Rows begin anew with a call that has no tokens before it; other calls continue them.
    """

    def __init__(self, mark: Sequence[int]) -> None:
        super().__init__()
        self.mark = mark
        self._seen = torch.empty(0, 0, dtype=torch.long)

    def see(self, _model: Any, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
        """Before a forward pass: its tokens (rows, s), by position or by name."""
        tokens: torch.Tensor = inputs[0] if inputs else settings["input_ids"]
        cache = settings.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self._seen = tokens
        else:
            self._seen = torch.cat([self._seen, tokens], 1)
        self.enter(open_positions(self._seen, self.mark)[:, -tokens.shape[1] :])


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _added(
    adapter: Adapter, parts: list[Contribution], gate: Gate | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Input and output of one matrix -> the output with the adapter's part of it."""
    factors = []
    for part in parts:
        low, high, _ = adapter.factors(part.path, part.expert)
        rows = slice(part.start, part.start + part.count)
        factors.append((rows, low, adapter.sizes[part.path].scale * high[part.first : part.first + part.count]))

    def add(value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for rows, low, high in factors:
            inner = linear(value, low.to(value))
            output[..., rows] += linear(gate(inner) if gate else inner, high.to(value))
        return output

    return add
