"""Run by tests/nano3/test_chunked_loss.py: the loss in chunks against a plain cross entropy, and what it has in memory.

python -m tests.helpers.chunked_loss_probe OUT.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from nano3.parity import worker  # first: it switches the CPU backend on
from nano3.parity.processes import on_ranks

# isort: split

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nano3.chunked_loss import chunk_by_chunk
from nano3.cli import UserError
from nano3.core import packed_seq_params
from nano3.loss import record_verdicts
from nano3.parity.case import PACK, VOCABULARY, Case, Sizes
from nano3.parity.comparison import as_json, compare, run

CASE = Case(pattern="-E", packs=((24, 40),))
CHUNKS = (0, 1, 20, 63, 64, 1000)
PADDED = 128
"""Rows of the vocabulary on one rank; no other width of the model."""


def by_hand() -> dict[str, Any]:
    """Three positions of one hidden value, two tokens with the logits (x, 0): chunks of two."""

    def loss(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, 0], labels[0], reduction="none")[None]

    layer = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    model: Any = SimpleNamespace(output_layer=lambda x: (x @ layer.T, None), compute_language_model_loss=loss)
    hidden = torch.tensor([math.log(3), math.log(3), 0.0], dtype=torch.float64)[:, None, None]
    losses, gradient = chunk_by_chunk(model, hidden, torch.tensor([[0, 1, 1]]), 2, learns=True)
    silent = chunk_by_chunk(model, hidden, torch.tensor([[0, 1, 1]]), 2, learns=False)
    assert gradient is not None
    return {
        "losses": losses.tolist(),
        "gradient": gradient.flatten().tolist(),
        "same": torch.equal(silent[0], losses) and silent[1] is None,
    }


class Widest(TorchDispatchMode):
    """The most positions whose logits, or anything as wide, any one tensor ever had."""

    rows = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        wide = [one for one in tree_leaves(made) if torch.is_tensor(one) and one.dim() > 1 and one.shape[-1] == PADDED]
        self.rows = max([self.rows, *(one.numel() // PADDED for one in wide if one.stride(-1) == 1)])
        return made


def forward(model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor | None) -> torch.Tensor:
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=labels,
        packed_seq_params=packed_seq_params(batch, 1),
    )


def learned(model: Any, losses: torch.Tensor, weights: torch.Tensor) -> dict[str, Any]:
    """Losses, and their weighted sum's gradients of all that learns."""
    model.zero_grad()
    (losses * weights).sum().backward()
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    return {"losses": losses.detach(), "gradients": torch.cat(found)}


def one_rank() -> dict[str, Any]:
    """Every size of a chunk against a cross entropy of the model's logits without their padding."""
    worker.keep_fp64_loss()
    batch = CASE.batch(0, 0)
    weights = torch.rand(1, PACK, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * batch["loss_mask"]
    results: dict[str, Any] = {"by hand": by_hand(), "chunks": {}}
    model = worker.build(CASE, Sizes()).train()
    logits = forward(model, batch, None)[0, :, :VOCABULARY]
    plain = learned(model, F.cross_entropy(logits, batch["labels"][0], reduction="none")[None], weights)
    for chunk in CHUNKS:
        model = worker.build(replace(CASE, loss_chunk=chunk), Sizes()).train()
        record_verdicts(model)
        with Widest() as widest:
            found = learned(model, forward(model, batch, batch["labels"]), weights)
        results["chunks"][chunk] = {
            name: float((found[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in plain
        } | {"rows": widest.rows, **evaluated(model, batch, logits, plain["losses"])}
    return results | {"refused": refused(batch)}


@torch.no_grad()
def evaluated(model: Any, batch: dict[str, torch.Tensor], logits: torch.Tensor, losses: torch.Tensor) -> dict[str, Any]:
    """Whether an evaluated model judges every label as its logits do, and how far its losses are off; twice."""
    right = logits.argmax(-1) == batch["labels"][0]
    model.eval()
    for _ in range(2):
        found = forward(model, batch, batch["labels"])
    judged = torch.cat(model.verdicts, 1)[0]
    without = forward(model, batch, None)[0, :, :VOCABULARY]
    return {
        "judged": torch.equal(judged, right),
        "evaluated": float((found - losses).abs().max()),
        "logits": float((without - logits).abs().max()),
    }


def refused(batch: dict[str, torch.Tensor]) -> str:
    """What is said where the output layer learns."""
    model = worker.build(replace(CASE, loss_chunk=20, adapters="none"), Sizes()).train()
    try:
        forward(model, batch, batch["labels"])
    except UserError as error:
        return str(error)
    return ""


def without_sequence_parallel() -> dict[str, Any]:
    """Tensor parallel 2 whose ranks all have all hidden states, a dense model."""
    case = replace(Case(pattern="M*-"), loss_chunk=20)
    config = worker.config_of

    def whole(*arguments: Any) -> Any:
        made = config(*arguments)
        made.sequence_parallel = False
        return made

    with patch.object(worker, "config_of", whole):
        return as_json(compare("tp2", case, Sizes(tp=2), run(case, Sizes(tp=2)), run(case.plain, Sizes())))


def main() -> None:
    result = {"without sequence parallel": without_sequence_parallel()}
    (found,) = on_ranks(Sizes(), one_rank)
    Path(sys.argv[1]).write_text(json.dumps(result | found))


if __name__ == "__main__":
    main()
