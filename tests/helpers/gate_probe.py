"""Run by tests/nano3/test_gate.py: pico in Megatron-Core with an adapter that waits for a mark, packed documents.

python -m tests.helpers.gate_probe NEMO_FOLDER ADAPTER OUT.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.helpers.model_probe import load, packed  # first: it switches the CPU backend on

# isort: split

import torch
from safetensors.torch import save_file

from nano3.checkpoints.adapter_checkpoint import save_adapter
from nano3.gate import open_positions
from nano3.lora.lora import Nano3LoRA
from nano3.targets import PRESETS, select
from tests.helpers.mcore_model import join_alone

LENGTHS = (37, 52, 1, 40)
"""Documents of the pack; the mark stands in the first, in the second and, twice, in the last."""
MARK = (105, 106, 107)
MARKED_AT = {0: 12, 1: 20, 3: 5}
AGAIN_AT, END_AT, END = 30, 20, 11
"""In the last document the turn ends, and a later turn has the mark again."""


def documents() -> torch.Tensor:
    """The tokens of the pack, (130,)."""
    tokens = torch.randint(20, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    places = [starts[number] + place for number, place in MARKED_AT.items()] + [starts[3] + AGAIN_AT]
    for place in places:
        tokens[place : place + len(MARK)] = torch.tensor(MARK)
    tokens[starts[3] + END_AT] = END
    return tokens


def logits(model: torch.nn.Module, tokens: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """(tokens,) packed documents -> (tokens, vocabulary)."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    model.gate.enter(gate)  # type: ignore[union-attr,operator]
    found: torch.Tensor = model(tokens[None], positions, None, packed_seq_params=packed(LENGTHS))[0]
    model.gate.leave(found)  # type: ignore[union-attr,operator]
    return found


def gradients(model: torch.nn.Module, tokens: torch.Tensor, gate: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Largest gradient of every adapter matrix, of a loss over the positions `where` alone, (matrices,)."""
    model.zero_grad()
    scores = logits(model, tokens, gate)[where].log_softmax(-1)
    scores.gather(1, tokens.roll(-1)[where, None]).sum().backward()
    return torch.stack([p.grad.abs().max() for n, p in model.named_parameters() if ".adapter." in n])  # type: ignore[union-attr]


def main() -> None:
    nemo, adapter, out = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    join_alone()
    model, arch = load(nemo)
    targets = [*PRESETS["peft"], "out_proj"]
    model = Nano3LoRA(modules=select(arch, targets, "none"), rank=4, alpha=8.0, mark=list(MARK))(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_(0, 0.1)
    tokens = documents()
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)[:-1]
    gate = open_positions(tokens[None], MARK, starts)
    before = torch.zeros(len(tokens), dtype=torch.bool)
    before[: MARKED_AT[0] + len(MARK) - 1] = True
    before[starts[1] : starts[1] + MARKED_AT[1] + len(MARK) - 1] = True
    results = {
        "tokens": tokens,
        "gate": gate[0],
        "before.gradients": gradients(model, tokens, gate, before),
        "after.gradients": gradients(model, tokens, gate, gate[0]),
    }
    with torch.no_grad():
        results["logits"] = logits(model, tokens, gate)[:, : arch.vocab_size]
        results["late"] = logits(model, tokens, gate & gate.roll(1, 1))[:, : arch.vocab_size]
    facts = {"format": 2, "rank_pattern": [], "alpha_pattern": [], "rslora": False, "dora": False, "rank": 4}
    facts |= {"alpha": 8.0, "targets": targets, "experts": "none", "mark": list(MARK)}
    save_adapter(model, adapter, {**facts, "base_config": json.loads((nemo / "hf/config.json").read_text())})
    save_file({name: value.detach().contiguous() for name, value in results.items()}, out)


if __name__ == "__main__":
    main()
