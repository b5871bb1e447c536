"""LoRA fine-tuning of Nemotron-3-Nano with NeMo 2 and Megatron-Core.

    python recipes/nemotron_lora.py --nodes 2 --model /models/nano --data /data/store
    python recipes/nemotron_lora.py --model pico --data runs/demo/train --local --ranks 2 layout.ep=2

MODEL is a preset (pico, nano), a Hugging Face folder or a NeMo checkpoint; DATA a token store (data_prep/prepare.py).
Everything else is key=value in the groups layout, lora, train, router, checkpoint and log: --dry-run prints them all.
OUT/adapter is what conversion/merge_lora.py merges; OUT also has metrics.jsonl, TensorBoard events and checkpoints. A
run that was interrupted goes on when the same command is given again.

To make a recipe of your own, copy recipes/medical_lora.py.
"""

from __future__ import annotations

from typing import Any

from finetune.command import main
from finetune.settings import Run, Settings
from nano3.cli import run


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
