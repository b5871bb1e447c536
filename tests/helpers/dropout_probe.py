"""Run by tests/nano3/test_dropout.py: what tensor- and expert-parallel ranks drop from adapters' inputs.

python -m tests.helpers.dropout_probe OUT.json
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

from nano3.parity import worker  # first: it switches the CPU backend on
from nano3.parity.processes import on_ranks

# isort: split

import torch
from torch import nn

from nano3.lora.dropout import Input, InputDropout
from nano3.parity.case import Case, Sizes

CASE = Case(pattern="MEM*E")


def dropped(case: Case, sizes: Sizes) -> tuple[list[tuple[str, str, torch.Tensor]], torch.Tensor]:
    """(layer, share, what was kept) of two forward passes in order, and the state of PyTorch's generator after them."""
    model = worker.build(case, sizes).train()
    masks: list[tuple[str, str, torch.Tensor]] = []

    def look(name: str, module: Any, _inputs: Any, output: torch.Tensor) -> None:
        masks.append((name, module.share, output != 0))

    for name, module in model.named_modules():
        if isinstance(module, InputDropout):
            module.p = 0.5
            module.register_forward_hook(partial(look, name))
    for step in range(2):
        for batch in worker.my_batches(case, sizes, step):
            with torch.no_grad():
                worker.forward_step([], iter([batch]), model)
    return masks, torch.get_rng_state()


def disagreements(name: str) -> dict[str, Any]:
    """Over two ranks: how many inputs of each share were dropped alike and not, and whether the generators agree."""
    sizes = Sizes.parse(name)
    (first, state), (second, other) = on_ranks(sizes, dropped, CASE, sizes)
    alike: dict[str, list[int]] = {share: [0, 0] for share in get_args(Input)}
    for (path, share, ours), (theirs_path, _, theirs) in zip(first, second, strict=True):
        assert path == theirs_path
        alike[share][ours.shape == theirs.shape and bool((ours == theirs).all())] += 1
    kept = torch.cat([mask.flatten() for _, share, mask in first if share == "whole"]).double().mean()
    return {"alike": alike, "generators": bool(torch.equal(state, other)), "kept": float(kept)}


def main() -> None:
    result = {name: disagreements(name) for name in ("tp2", "tp2.ep2", "tp2.etp2")}
    with patch.object(InputDropout, "forward", nn.Dropout.forward):
        result["one generator"] = disagreements("tp2.ep2")
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
