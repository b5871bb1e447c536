"""Run by tests/nano3/test_meta.py: adapters on the real model on the meta device, and how many train.

python -m tests.helpers.meta_adapters_probe MODEL ranks:ep:EXPERTS:DORA ...
-> JSON {case: [trainable parameters of rank 0]}
"""

from __future__ import annotations

import json
import sys

from tests.helpers.mcore_model import build  # first: it switches the CPU backend on

# isort: split

from nano3.arch import Arch, resolve_model
from nano3.lora.lora import Nano3LoRA
from nano3.targets import PRESETS, select
from tests.helpers.meta_probe import rank_of


def trainable(arch: Arch, ranks: int, ep: int, experts: str, dora: bool) -> int:
    """Trainable parameters that rank 0 holds with all targets at rank 32."""
    with rank_of(0, ranks, {"ep": ep}):
        modules = select(arch, PRESETS["all"], experts)
        lora = Nano3LoRA(modules=modules, experts=experts, dora=dora)
        model = lora(build(arch, 8192, ep=ep))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def main() -> None:
    arch, result = Arch.load(resolve_model(sys.argv[1])), {}
    for case in sys.argv[2:]:
        ranks, ep, experts, dora = case.split(":")
        result[case] = trainable(arch, int(ranks), int(ep), experts, dora == "dora")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
