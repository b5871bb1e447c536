"""From raw questions to a merged Hugging Face checkpoint and its FP8 form, on two CPU ranks, in minutes.

    python recipes/demo.py
    python recipes/demo.py --model pico --data STORE --local --ranks 2      # as a recipe like the others: training only

Teaches pico, the small model of this repository, a task that its pretraining did not contain. Data: held-out and
training questions from reasoning-gym, an overlap check, packed stores. Cost: about six minutes on 2 CPU cores.
Result: greedy answers by plain transformers of the base, of the tuned model (the adapter beside the base's weights), of
the merged one and of the FP8 one, whose weights, activations and cache are rounded as a server would; OUT/report.json
and OUT/report.html. Exit code 1 for a broken promise.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from finetune import command
from finetune.settings import LogSettings, LoraSettings, Run, Settings, TrainSettings
from finetune.whole_path import Stages, broken_promises, fresh_folder, train, whole_path
from launch.plan.layout import Layout
from nano3.arch import resolve_model
from nano3.cli import UserError, run
from pico.tasks import DEMO, PRETRAINING

KIND = "demo-run"
TITLE = "Teach pico to sort 8 to 10 numbers"
"""`pico.tasks.DEMO` in words; pretraining sorted at most 5."""
OLD_QUESTIONS = 60
"""Held-out questions of each old task, for what the tuning made the model forget."""
HELD_OUT_SEED, TRAINING_SEED = 101, 202


def settings() -> Settings:
    """A hot, short run of a small model; everything else is the published recipe's."""
    return Settings(
        layout=Layout(ep=2),
        lora=LoraSettings(rank=16, alpha=32.0),
        train=TrainSettings(steps=300, warmup=10, lr=4e-3, weight_decay=0.0, global_batch=2, seq_length=1024),
        log=LogSettings(every=20),
    )


def pico_number_sorting(run: Run) -> Any:
    """The recipe: the published one, with the settings above."""
    from finetune.configuration import lora_recipe

    return lora_recipe(run)


def prepare_data(out: Path, held_out: int, training: int, old_training: int) -> dict[str, int]:
    """Writes held-out and training questions and their packed stores; returns the overlap counts, which are 0."""
    from data_prep.overlap import HeldOut, overlap_of_files
    from data_prep.prepare import Options, prepare
    from nano3.rows import write_rows
    from pico.tasks import conversations, rows

    pico = resolve_model("pico")
    held = rows(DEMO, held_out, HELD_OUT_SEED)
    old = {name: rows(task, OLD_QUESTIONS, HELD_OUT_SEED) for name, (task, _) in PRETRAINING.items()}
    forbidden = HeldOut(conversations([*held, *(row for part in old.values() for row in part)]))
    train = rows(DEMO, training, TRAINING_SEED, forbidden)
    for task, share in PRETRAINING.values():
        train += rows(task, max(1, int(share * old_training)), TRAINING_SEED, forbidden)
    write_rows(out / "held_out.jsonl", held)
    write_rows(out / "old_tasks.jsonl", [{**row, "source": name} for name, part in old.items() for row in part])
    write_rows(out / "train.jsonl", train)
    overlap = overlap_of_files(out / "train.jsonl", out / "held_out.jsonl")
    print(overlap)
    if overlap.exact or overlap.near:
        raise UserError("training and held-out questions overlap; the score would mean nothing")
    for name, questions in (("train", "train.jsonl"), ("validation", "held_out.jsonl")):
        prepare([out / questions], pico, out / name, seq_length=1024, options=Options(thinking=False))
    return {"exact": len(overlap.exact), "near": len(overlap.near)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks, a multiple of 2 (default: 2)")
    parser.add_argument("--held-out", type=int, default=500, metavar="N", help="questions to score (default: 500)")
    parser.add_argument("--training", type=int, default=7500, metavar="N", help="new questions to train on")
    parser.add_argument("--old-training", type=int, default=1500, metavar="N", help="old questions mixed in")
    args = parser.parse_args()
    out, stages, started = fresh_folder(args.out, KIND), Stages(), time.monotonic()
    with stages.stage("data"):
        overlap = prepare_data(out, args.held_out, args.training, args.old_training)
    tune = partial(train, out, args.ranks, settings, pico_number_sorting)
    result = whole_path(out, resolve_model("pico"), TITLE, stages, tune, {"overlap": overlap})
    low, high = result["ci95_gain"]
    print(
        f"\n{TITLE}: {result['base_accuracy']:.1%} -> {result['tuned_accuracy']:.1%} on {result['n']} held-out "
        f"questions (95 % interval of the gain {low:+.1%} to {high:+.1%}), merged {result['merged_accuracy']:.1%}, "
        f"FP8 {result['fp8_accuracy']:.1%}, {time.monotonic() - started:.0f} s"
    )
    print(out / "report.json", out / "report.html", sep="\n")
    broken = broken_promises(result)
    print("".join(f"FAILED: {promise}\n" for promise in broken), end="")
    return 1 if broken else 0


if __name__ == "__main__":
    run(lambda: command.main(__doc__, settings, pico_number_sorting) if command.has_data() else main())
