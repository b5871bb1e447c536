"""LoRA on MedMCQA, 182,822 questions of medical entrance exams, in one of three variants (docs/medical.md).

    python recipes/medical_lora.py --nodes 2 --model /models/nano --data /data/medmcqa
    make medical-smoke                              # 200 real questions on pico, two CPU ranks

Teaches the post-trained Nemotron-3-Nano-30B-A3B the right letters; the Base model has no chat template, so its prompts
would be ours alone. Data: data_prep/convert.py --form medmcqa --say letter, reasoned or explained; the letter is
marked, its loss reported apart. Cost: one pass is 13.5M tokens, 30M with explanations; not measured on a GPU.
Result: OUT/adapter. With --rows it is a smoke run on pico: both scorers before and after, by subject, and
OUT/report.json. Exit code 1 when what was taught does not come back, or what was not is no guess.
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
from finetune.settings import LogSettings, LoraSettings, Run, Settings, StageSettings, TrainSettings
from finetune.whole_path import fresh_folder, train
from launch.plan.layout import Layout
from nano3.arch import resolve_model

KIND, TASK, SEQ_LENGTH = "medical-smoke", "medmcqa", 1024
LEAST_TRAINED, CHANCE = 0.95, 0.25
"""What the smoke run promises: questions that it was taught, by log-likelihood; and those that it was not."""
AT_A_TIME = 16  # questions in a batch: of 350 tokens each, 128 took a CPU five times as long (docs/medical.md)
LETTER_APART = StageSettings(weights="fixed")  # all weights 1: stage_loss/answer of metrics.jsonl is the letter's
NOTE = "pico knows no medicine: what it was taught it has by heart, and every other question it guesses"


def settings() -> Settings:
    """The published recipe at 16 packs of 4,096 tokens a step: one pass is 206 steps, at 128 packs it would be 26."""
    return Settings(train=TrainSettings(epochs=1.0, global_batch=16, seq_length=4096), stages=LETTER_APART)


def pico_settings() -> Settings:
    """By heart: a large, hot adapter and many passes over few questions."""
    return Settings(
        layout=Layout(ep=2),
        lora=LoraSettings(rank=64, alpha=128.0),
        train=TrainSettings(steps=320, warmup=10, lr=1e-3, weight_decay=0.0, global_batch=2, seq_length=SEQ_LENGTH),
        log=LogSettings(every=20),
        stages=LETTER_APART,
    )


def medical_lora(run: Run) -> Any:
    """The recipe: the published one, with the settings above."""
    from finetune.configuration import lora_recipe

    return lora_recipe(run)


def prepare_data(rows: str, out: Path, held_out: int) -> None:
    """Writes both sets and their stores. Rows of the validation split may be among them: the adapter is thrown away."""
    from data_prep.chat_rows import ChatRows, form_named
    from data_prep.convert import convert, held_out_file
    from data_prep.prepare import prepare
    from nano3.rows import open_rows, write_rows

    whole = out / "rows.jsonl"
    convert(ChatRows(rows, form_named(TASK), say="letter"), whole, held_out)
    for name, file in (("train", whole), ("validation", held_out_file(whole))):
        write_rows(out / f"{name}.jsonl", ({**row.fields, "evaluation_only": False} for row in open_rows(file)))
        prepare([out / f"{name}.jsonl"], resolve_model("pico"), out / name, seq_length=SEQ_LENGTH)


def scores(out: Path) -> dict[str, Any]:
    """Both scorers on both sets, before and after; prints the subjects. Returns what the report says."""
    from evaluation.comparison import by_groups, compare, table
    from evaluation.significance import wilson_interval
    from finetune.scoring import score_both

    found: dict[str, Any] = {"note": NOTE}
    for name in ("train", "validation"):
        into = out / f"scores-{name}"
        pico, adapter, questions = resolve_model("pico"), out / "lora" / "adapter", out / f"{name}.jsonl"
        base, tuned = score_both(pico, adapter, questions, TASK, into, batch_size=AT_A_TIME)
        letters = [sum(row["letter_correct"] for row in result["answers"]) for result in (base, tuned)]
        interval = wilson_interval(letters[1], tuned["n"])
        found[name] = compare(base, tuned) | {"letters": letters, "ci95_letters": interval}
        print(f"\n{name}, written answers by subject:\n{table(by_groups(base, tuned))}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", required=True, help="MedMCQA's rows in any of their forms, for the smoke run")
    parser.add_argument("--out", type=Path, default=Path("runs/medical-smoke"), help="folder to write")
    parser.add_argument("--held-out", type=int, default=100, metavar="N", help="questions not to teach (default: 100)")
    args = parser.parse_args()
    out = fresh_folder(args.out, KIND)
    prepare_data(args.rows, out, args.held_out)
    metrics = train(out, 2, pico_settings, medical_lora)["metrics"]
    found = scores(out) | {"letter_loss": [row["stage_loss/answer"] for row in metrics if "stage_loss/answer" in row]}
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    taught, held = found["train"], found["validation"]
    (low, high), share = held["ci95_letters"], taught["letters"][1] / taught["n"]
    print(
        f"\nby log-likelihood: {share:.1%} of the {taught['n']} taught (before: {taught['letters'][0]}), "
        f"{held['letters'][1]} of the {held['n']} others (95 %: {low:.1%} to {high:.1%}; chance: {CHANCE:.0%}). {NOTE}."
    )
    return 0 if share >= LEAST_TRAINED and low <= CHANCE <= high else 1


if __name__ == "__main__":
    run(lambda: command.main(__doc__, settings, medical_lora) if command.has_data() else main())
