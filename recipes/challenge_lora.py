r"""LoRA for the public reasoning challenge: puzzles by hidden rules, the answer in \boxed{}, a zip that vLLM loads.

    python recipes/challenge_lora.py --nodes 2 --model /models/nano --data /data/puzzles    # training only
    python conversion/submission.py write runs/lora/adapter submission.zip
    python recipes/challenge_lora.py                                                        # the whole way on pico

Teaches the six kinds of data_prep/puzzles with the reasoning of their solvers, on layers that vLLM and PEFT both load;
a rank above the challenge's 32 is refused before anything starts. Data: a token store of puzzles (docs/challenge.md).
Cost: not measured on a GPU. Result: OUT/adapter, of which conversion/submission.py makes the zip. Without --model and
--data a demo on pico: the zip, and what base, tuned model and zip answer. Exit code 1 for a broken promise.
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

KIND, TASK, SEQ_LENGTH = "challenge-run", "reasoning-challenge", 1024
VALIDATED = 48  # of the held-out puzzles, the first, for a loss at the end of the training
LEAST_GAIN, LEAST_EQUAL = 0.30, 0.99  # promised: the gain, and answers that PEFT writes from the zip to the letter


def settings() -> Settings:
    """The published recipe on the layers that PEFT and vLLM both load, at most at the challenge's rank."""
    return Settings(
        lora=LoraSettings(preset="peft", rank=32, alpha=32.0, max_rank=32),
        train=TrainSettings(lr=1e-4, global_batch=32),
    )


def pico_settings() -> Settings:
    """The same for the small model: hot and short."""
    return Settings(
        layout=Layout(ep=2),
        lora=LoraSettings(preset="peft", rank=32, alpha=64.0, max_rank=32),
        train=TrainSettings(steps=1000, warmup=10, lr=3e-3, weight_decay=0.0, global_batch=2, seq_length=SEQ_LENGTH),
        log=LogSettings(every=50),
    )


def challenge_lora(run: Run) -> Any:
    """The recipe: the published one, with the settings above."""
    from finetune.configuration import lora_recipe

    return lora_recipe(run)


def prepare_data(out: Path, task: str, level: int, held_out: int, training: int) -> None:
    """Writes held-out and training puzzles of one task and level, none of them alike, and their packed stores."""
    from data_prep.chat_rows import read_conversations
    from data_prep.generate import fresh_rows
    from data_prep.overlap import HeldOut
    from data_prep.prepare import prepare
    from nano3.rows import write_rows

    write_rows(out / "held_out.jsonl", fresh_rows(task, held_out, 101, level=level))
    held = HeldOut(read_conversations(out / "held_out.jsonl"))
    write_rows(out / "train.jsonl", fresh_rows(task, training, 202, held, level=level))
    write_rows(out / "validation.jsonl", fresh_rows(task, VALIDATED, 101, level=level))
    for name in ("train", "validation"):
        prepare([out / f"{name}.jsonl"], resolve_model("pico"), out / name, seq_length=SEQ_LENGTH)


def scores(out: Path) -> dict[str, Any]:
    """Writes the zip; scores the base, the tuned model and what PEFT loads from the zip, and compares them."""
    from conversion.submission import write_submission
    from evaluation.comparison import compare
    from finetune.scoring import peft_of, score, score_both

    pico, adapter, questions = resolve_model("pico"), out / "lora" / "adapter", out / "held_out.jsonl"
    print(f"{out / 'submission.zip'}: {write_submission(adapter, out / 'submission.zip')}", flush=True)
    base, tuned = score_both(pico, adapter, questions, TASK, out, thinking=True)
    with peft_of(out / "submission.zip") as prepare:
        loaded = score(pico, questions, TASK, out / "scores-zip.json", thinking=True, prepare=prepare)
    equal = [a["answer"] == b["answer"] for a, b in zip(tuned["answers"], loaded["answers"], strict=True)]
    return compare(base, tuned, zip=loaded) | {"equal": sum(equal) / len(equal)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/challenge"), help="folder to write")
    parser.add_argument("--kind", default="numerals", help="kind of puzzle (default: numerals)")
    parser.add_argument("--level", type=int, default=0, metavar="N", help="0 (numerals alone) to 3 (default: 0)")
    parser.add_argument("--held-out", type=int, default=500, metavar="N", help="puzzles to score (default: 500)")
    parser.add_argument("--training", type=int, default=4000, metavar="N", help="puzzles to train on")
    args = parser.parse_args()
    out = fresh_folder(args.out, KIND)
    prepare_data(out, f"challenge/{args.kind}", args.level, args.held_out, args.training)
    train(out, 2, pico_settings, challenge_lora)
    found = scores(out)
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    low, high = found["ci95_gain"]
    print(
        f"{args.kind}, level {args.level}: {found['base_accuracy']:.1%} -> {found['tuned_accuracy']:.1%} boxed and "
        f"right of {found['n']} (95 % interval of the gain {low:+.1%} to {high:+.1%}); from the zip "
        f"{found['zip_accuracy']:.1%}, {found['equal']:.1%} of the answers letter for letter"
    )
    return 0 if found["gain"] >= LEAST_GAIN and found["equal"] >= LEAST_EQUAL else 1


if __name__ == "__main__":
    run(lambda: command.main(__doc__, settings, challenge_lora) if command.has_data() else main())
