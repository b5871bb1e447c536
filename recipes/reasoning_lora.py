"""LoRA for mathematics and logic: chains of thought with thinking on, a mixture with weights and a curriculum.

    python recipes/reasoning_lora.py --nodes 2 --model /models/nano --data mixture.yaml
    make reasoning-demo                             # two tasks of reasoning-gym on pico, two CPU ranks

Teaches the post-trained Nemotron-3-Nano-30B-A3B to reason on sums and on logic, scored on GSM8K, MATH, SVAMP, LogiQA,
ReClor, LSAT. Data: a mixture of token stores, each free of all six sets' questions (docs/reasoning.md has the lines).
Cost: not measured on a GPU; --dry-run prints it for your stores. Result: OUT/adapter. Without --model and --data it is
a demo: two tasks and old ones in mixture on pico, with report.json, paired intervals, and what was forgotten. Exit code
1 for a broken promise.
"""

from __future__ import annotations

try:
    from nano3.cli import run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import json
from pathlib import Path
from typing import Any

from finetune import command
from finetune.settings import LogSettings, LoraSettings, Run, Settings, TrainSettings
from finetune.whole_path import fresh_folder, train
from launch.plan.layout import Layout
from nano3.arch import resolve_model

KIND, SEQ_LENGTH, OLD_QUESTIONS, BLOCKS = "reasoning-run", 1024, 60, 2
LEAST_GAIN, LEAST_LOW = 0.20, 0.10
"""What the demo promises: the gain over the base in its better form, and the lower end of its interval."""
WEIGHTS = {"sort": 0.45, "filter": 0.35, "old": 0.2}
"""Shares of the packs: both tasks, and what pico knew before, so that it keeps it."""


def settings() -> Settings:
    """The published recipe, cooler: long chains at 1e-4 cost what the model knew. Ranks 8 to 64 are worth a sweep."""
    return Settings(
        lora=LoraSettings(rank=32, alpha=64.0, max_rank=64), train=TrainSettings(lr=5e-5, epochs=2.0, global_batch=32)
    )


def pico_settings() -> Settings:
    """The same for the small model: hot and short."""
    return Settings(
        layout=Layout(ep=2),
        lora=LoraSettings(rank=32, alpha=64.0, max_rank=64),
        train=TrainSettings(steps=500, warmup=10, lr=3e-3, weight_decay=0.0, global_batch=2, seq_length=SEQ_LENGTH),
        log=LogSettings(every=20),
    )


def reasoning_lora(run: Run) -> Any:
    """The recipe: the published one, with the settings above."""
    from finetune.configuration import lora_recipe

    return lora_recipe(run)


def prepare_data(out: Path, held_out: int, training: int) -> None:
    """Writes the questions, a store for each part of the mixture, the validation store, and mixture.yaml."""
    from data_prep.overlap import HeldOut
    from data_prep.prepare import prepare
    from nano3.pack_index import Curriculum
    from nano3.rows import write_rows
    from pico.reasoning import TASKS, reasoned_rows
    from pico.tasks import PRETRAINING, conversations, rows

    held = [row for name in TASKS for row in reasoned_rows(name, held_out // len(TASKS), 101)]
    old = [{**row, "source": name} for name, (task, _) in PRETRAINING.items() for row in rows(task, OLD_QUESTIONS, 101)]
    forbidden = HeldOut(conversations([*held, *old]))
    parts = {name: list(reasoned_rows(name, round(WEIGHTS[name] * training), 202, forbidden)) for name in TASKS}
    kept = WEIGHTS["old"] * training
    parts["old"] = [
        row for task, part in PRETRAINING.values() for row in rows(task, round(part * kept), 202, forbidden)
    ]
    for name, part in {**parts, "held_out": held, "old_tasks": old}.items():
        write_rows(out / f"{name}.jsonl", part)
    for name in parts:
        order = Curriculum("length", BLOCKS)
        prepare([out / f"{name}.jsonl"], resolve_model("pico"), out / name, seq_length=SEQ_LENGTH, curriculum=order)
    prepare([out / "held_out.jsonl"], resolve_model("pico"), out / "validation", seq_length=SEQ_LENGTH)
    stores = [{"path": name, "weight": weight} for name, weight in WEIGHTS.items()]
    mixture = {"stores": stores, "curriculum": {"order": "length", "blocks": BLOCKS}}
    (out / "mixture.yaml").write_text(json.dumps(mixture))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning"), help="folder to write")
    parser.add_argument("--held-out", type=int, default=500, metavar="N", help="questions to score (default: 500)")
    parser.add_argument("--training", type=int, default=6000, metavar="N", help="questions to train on, old ones too")
    args = parser.parse_args()
    out = fresh_folder(args.out, KIND)
    prepare_data(out, args.held_out, args.training)
    train(out, 2, pico_settings, reasoning_lora, data="mixture.yaml")
    from finetune.scoring import reasoning_report

    report = reasoning_report(resolve_model("pico"), out / "lora" / "adapter", out)
    (low, high), better = report["ci95_gain"], report["base_better"]
    print(
        f"reasoning: {report[better]:.1%} ({better}) -> {report['tuned_accuracy']:.1%} of {report['n']} held-out "
        f"questions (95 % interval of the gain {low:+.1%} to {high:+.1%}); {out / 'report.json'}"
    )
    return 0 if report["gain"] >= LEAST_GAIN and low > LEAST_LOW else 1


if __name__ == "__main__":
    run(lambda: command.main(__doc__, settings, reasoning_lora) if command.has_data() else main())
