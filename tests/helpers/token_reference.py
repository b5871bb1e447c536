"""A store with weights and two sources, and its loss, accuracy and expert load as plain transformers computes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data_prep.store import StoreWriter
from evaluation.hf_model import load_reference
from nano3.outputs import fresh_output
from nano3.token_store import KIND, TokenStore

WEIGHTS = (1.0, 0.5, 2.0, 0.3)
SOURCES = ("tales", "sums")


def weighted_store(path: Path, documents: int, shortest: int, longest: int, seed: int = 0) -> TokenStore:
    """Documents of `shortest` to `longest` positions; the last 1 to 13 are supervised, with a weight of `WEIGHTS`."""
    rng = np.random.default_rng(seed)
    with fresh_output(path, KIND) as folder:
        writer = StoreWriter(folder)
        for number in range(documents):
            length = int(rng.integers(shortest, longest + 1)) + 1
            mask = np.zeros(length, dtype=np.float32)
            mask[max(1, length - number % 13 - 1) :] = WEIGHTS[number % len(WEIGHTS)]
            writer.add(rng.integers(3, 128, length), mask, SOURCES[number % 3 // 2])
        writer.finish(SimpleNamespace(sha256="0" * 64, vocab_size=128))  # type: ignore[arg-type]
    return TokenStore(path)


def figures(model: Path, store: TokenStore) -> dict[str, float]:
    """Loss, accuracy and losses by source over the whole store, document by document, with sums in FP64."""
    reference = load_reference(model, torch.float32)
    sums = {name: np.zeros(4) for name in SOURCES}
    for number in range(len(store)):
        ids, weights = (torch.tensor(np.array(part)) for part in store.document(number))
        ids, weights = ids.long(), weights[1:].double()
        with torch.no_grad():
            logits = reference(ids[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double()
        right = (logits.argmax(-1) == ids[1:]) & (weights > 0)
        name = store.source_names[store.source(number)]
        sums[name] += [(losses * weights).sum(), weights.sum(), right.sum(), (weights > 0).sum()]
    loss, weight, right, supervised = sum(sums.values())
    by_source = {f"validation_loss/{name}": part[0] / part[1] for name, part in sums.items()}
    return {"validation_loss": loss / weight, "validation_accuracy": right / supervised, **by_source}


def expert_load(model: Path, store: TokenStore, documents: Iterable[int]) -> dict[int, np.ndarray]:
    """Tokens of these documents that each routed expert receives, by layer number from 0."""
    reference = load_reference(model, torch.float32)
    loads: dict[int, np.ndarray] = {}
    for name, module in reference.named_modules():
        if name.endswith(".gate"):
            number = int(name.split("layers.")[1].split(".")[0])
            loads[number] = np.zeros(module.num_experts, dtype=np.int64)
            module.register_forward_hook(_counting(loads[number]))
    for number in documents:
        ids, _ = store.document(int(number))
        with torch.no_grad():
            reference(torch.tensor(np.array(ids[:-1])).long()[None])
    return loads


def _counting(load: np.ndarray) -> Any:
    def hook(_module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        load[:] += np.bincount(output[2].flatten().numpy(), minlength=len(load))

    return hook
