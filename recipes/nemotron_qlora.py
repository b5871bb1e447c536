"""QLoRA fine-tuning of Nemotron-3-Nano on one GPU: the frozen linear layers in 4 bits (NF4), the adapters in 16.

    python recipes/nemotron_qlora.py --model /models/nano --data /data/store
    python recipes/nemotron_qlora.py --model pico --data runs/demo/train --local train.seq_length=1024

Teaches what nemotron_lora.py teaches, the adapters on all linear layers, in a fifth of its memory: 16.2 GiB of weights.
Data: a token store of your own conversations (data_prep/prepare.py) with packs of the length below. Cost: one GPU of 24
GB and more by the plan of launch/preflight.py, which no GPU has confirmed; speed is not measured. Result: OUT/adapter.
conversion/merge_lora.py adds it to the original weights, or with --base dequantized to those that it was trained on.

MODEL is a Hugging Face folder, which is read tensor by tensor and quantized on its way: no copy in 16 bits is made, in
memory or on disk. Everything else is as in nemotron_lora.py: key=value, --help-settings, a run that resumes.
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
from finetune.settings import LoraSettings, Run, Settings, TrainSettings
from launch.plan.hardware import gib_here

LOSS_CHUNK = 512
"""Positions whose logits exist at a time: 0.4 GiB, less than the backward pass of a layer needs later on."""


def settings() -> Settings:
    """The published recipe's adapters on a base in NF4; packs and recomputation by the memory of the GPU here.

    Rank 32 on all linear layers, one adapter for the routed experts of a layer, 1e-4 cosine. The batch is smaller than
    there: one GPU takes its packs one after the other. The loss is in chunks, which costs no product more and spares
    the logits of a pack.
    """
    seq_length, recompute = fitting(gib_here())
    return Settings(
        lora=LoraSettings(base="nf4"),
        train=TrainSettings(global_batch=16, seq_length=seq_length, recompute=list(recompute), loss_chunk=LOSS_CHUNK),
    )


def fitting(gib: float | None) -> tuple[int, tuple[Any, ...]]:
    """Positions of a pack, and what is recomputed, on a GPU of so many GiB; None: no GPU, so as for the smallest.

    docs/qlora.md has the plan behind each line.
    """
    for least, seq_length, recompute in ((70, 8192, ()), (39, 4096, ()), (31, 4096, ("moe", "layernorm"))):
        if gib is not None and gib >= least:
            return seq_length, recompute
    return 4096, ("full",)


def nemotron_3_nano_qlora(run: Run) -> Any:
    """The recipe: the NeMo 2 configuration of nemotron_lora.py. `lora.base=nf4` is all that it takes."""
    from finetune.configuration import lora_recipe

    return lora_recipe(run)


if __name__ == "__main__":
    run(lambda: main(__doc__, settings, nemotron_3_nano_qlora, gpus_per_node=1))
