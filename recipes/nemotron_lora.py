"""LoRA fine-tuning of Nemotron-3-Nano with NeMo 2 and Megatron-Core.

    python recipes/nemotron_lora.py --nodes 2 --model /models/nano --data /data/store
    python recipes/nemotron_lora.py --model pico --data runs/demo/train --local --ranks 2 layout.ep=2

Teaches the published LoRA recipe of this model: rank 32 on every linear layer, one adapter for a layer's experts.
Data: a token store of your own conversations (data_prep/prepare.py). Cost: 8 GPUs of 80 GB hold it
(launch/preflight.py says so for yours); speed on a GPU is not measured. Result: OUT/adapter, which
conversion/merge_lora.py merges, metrics.jsonl, TensorBoard events and checkpoints.

MODEL is a preset (pico, nano), a Hugging Face folder or a NeMo checkpoint. Everything else is key=value;
--help-settings explains each. A run that was interrupted resumes when you give the same command again. To make a
recipe of your own, copy this file anywhere and change the two functions: recipes/README.md.
"""

from __future__ import annotations

try:
    from nano3.cli import run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

from typing import Any

from finetune.command import main
from finetune.settings import Run, Settings


def settings() -> Settings:
    """NVIDIA's published LoRA recipe for this model: rank 32 on all linear layers, 1e-4 cosine, global batch 128."""
    return Settings()


def nemotron_3_nano_lora(run: Run) -> Any:
    """The recipe: the whole NeMo 2 configuration of a run, a `run.Partial` of `llm.finetune`.

    NeMo-Run serializes it, ships it and rebuilds it; built and called, it trains. Its parts are functions of
    finetune/configuration.py, a file of its own because it imports NeMo, which takes many seconds.
    """
    from finetune.configuration import lora_recipe

    return lora_recipe(run)


if __name__ == "__main__":
    run(lambda: main(__doc__, settings, nemotron_3_nano_lora))
