"""From raw questions to a merged Hugging Face checkpoint and its FP8 form, on two CPU ranks, in minutes.

    python recipes/demo.py

Teaches pico, the small model of this repository, a task that its pretraining did not contain: held-out and training
questions from reasoning-gym, an overlap check, packed stores, HF -> NeMo, the LoRA recipe with expert parallel 2, merge
into a Hugging Face folder, FP8 by the published recipe, and greedy answers by plain transformers: of the base, of the
tuned model (the adapter beside the base's weights), of the merged one and of the FP8 one, whose weights, activations
and cache are rounded as a server would. Writes OUT/report.json and OUT/report.html. Exit code 1 for a broken promise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nano3.arch import resolve_model
from nano3.cli import UserError, check_output, fresh_output, run
from pico.tasks import DEMO, PRETRAINING

KIND = "demo-run"
TITLE = "Teach pico to sort 8 to 10 numbers"
"""`pico.tasks.DEMO` in words; pretraining sorted at most 5."""
OLD_QUESTIONS = 60
"""Held-out questions of each old task, for what the tuning made the model forget."""
HELD_OUT_SEED, TRAINING_SEED = 101, 202
CALIBRATION_SAMPLES = 256
"""Training documents that set FP8's scales."""
LEAST_GAIN, LEAST_LOW = 0.30, 0.15
"""What the demo promises: below this it fails, since then something on the path is broken."""
RECIPE = [
    "layout.ep=2",
    "lora.rank=16",
    "lora.alpha=32",
    "train.steps=300",
    "train.warmup=10",
    "train.lr=4e-3",
    "train.weight_decay=0.0",
    "train.global_batch=2",
    "train.seq_length=1024",
    "log.every=20",
]
"""The run's settings; everything else is the recipe's default."""


class Stages:
    """Seconds by stage, each announced when it starts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)


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


def train(out: Path, ranks: int) -> dict[str, Any]:
    """Runs the LoRA recipe on CPU ranks; returns what the report says about it."""
    from finetune import command as recipe

    flags = ["--model", "pico", "--local", "--ranks", str(ranks), "--out", str(out / "lora")]
    flags += ["--data", str(out / "train"), "--validation", str(out / "validation"), *RECIPE]
    task, arch = recipe.resolve(recipe.parser().parse_args(flags))
    code = recipe.train(task, arch)
    if code:
        raise SystemExit(code)
    metrics = [json.loads(line) for line in (out / "lora" / "metrics.jsonl").read_text().splitlines()]
    layout = task.settings.layout
    return {
        "metrics": metrics,
        "train_tokens": sum(row.get("tokens", 0) for row in metrics),
        "layout": {name: getattr(layout, name) for name in ("tp", "pp", "cp", "ep", "etp")} | {"ranks": ranks},
        "adapter_parameters": recipe.trainable_parameters(task, arch),
        "settings": dict(item.split("=", 1) for item in RECIPE),
    }


def router_unchanged(adapter: Path, *folders: Path) -> bool:
    """Whether the routers of these Hugging Face folders are, bit for bit, those that training hashed at its end."""
    from conversion.adapters.adapter_folder import Adapter
    from conversion.checkpoint.hf_folder import HFFolder

    unchanged = True
    for folder in folders:
        with HFFolder(folder) as hf:
            try:
                unchanged &= Adapter(adapter, hf.arch).check_base(hf.rows)
            except UserError as error:
                print(f"router: {error}", flush=True)
                unchanged = False
    return unchanged


def export_fp8(out: Path, base: Path, merged: Path) -> dict[str, Any]:
    """Writes OUT/fp8, checks it and reads it back to OUT/fp8-plain; returns what the report says about it."""
    from conversion.certify import verify
    from conversion.dequantize import dequantize
    from conversion.fp8.selection import Selection
    from conversion.lint_export import lint
    from conversion.quantize_fp8 import calibration_samples, quantize
    from nano3.arch import Arch
    from nano3.token_store import TokenStore

    samples = calibration_samples(TokenStore(out / "train"), CALIBRATION_SAMPLES)
    found = quantize(merged, out / "fp8", Selection.published(Arch.load(merged)), samples)
    problems = [f"{reader}: {problem}" for reader, problem in lint(out / "fp8")]
    problems += verify(merged, base) + verify(out / "fp8", merged)
    for problem in problems:
        print(problem, flush=True)
    return {
        "matrices": dequantize(out / "fp8", out / "fp8-plain"),
        "calibration tokens": found.tokens,
        "experts without tokens": sum(found.idle.values()),
        "problems": problems,
    }


def score(out: Path, base: Path, adapter: Path, merged: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of the four models on the held-out questions, and their accuracies on the old tasks."""
    from conversion.adapters.unmerged import with_adapter
    from evaluation.evaluate import evaluate_model, write_result
    from evaluation.judging.questions import load_questions

    models = {"base": base, "tuned": base, "merged": merged, "fp8": out / "fp8-plain"}
    results: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for name, folder in models.items():
        prepare = with_adapter(adapter, base) if name == "tuned" else None
        for questions in ("held_out", "old_tasks"):
            result = evaluate_model(folder, load_questions(out / f"{questions}.jsonl"), prepare=prepare)
            write_result(result, out / f"{name}_{questions}.json")
            if questions == "held_out":
                results[name] = result
            else:
                for task, part in result["by_source"].items():
                    old.setdefault(task, {"n": part["n"]})[name] = part["accuracy"]
    return results, old


def git_commit() -> str:
    """The commit that ran, `unknown` outside a git checkout; `+changes` when files differ from it."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def report(
    out: Path, stages: Stages, facts: dict[str, Any], results: dict[str, Any], old: dict[str, Any]
) -> dict[str, Any]:
    """Writes report.json and report.html; returns the report."""
    from evaluation.comparison import compare
    from evaluation.report import examples_from, write_report

    metrics = facts.pop("metrics")
    content = {
        "task": TITLE,
        **compare(**results),
        **facts,
        "seconds": stages.seconds,
        "git_commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        "command": "make demo",
        "forgetting": old,
    }
    curve = {
        "training": [(row["step"], row["loss"]) for row in metrics if "loss" in row],
        "validation": [(row["step"], row["validation_loss"]) for row in metrics if "validation_loss" in row],
    }
    write_report(out, content, curve, examples_from(results["base"], results["tuned"]))
    return content


def demo(out: Path, ranks: int, held_out: int, training: int, old_training: int) -> dict[str, Any]:
    """The whole path from questions to the report; `out` is replaced when it is a demo's."""
    from conversion.merge_lora import merge

    base, stages = resolve_model("pico"), Stages()
    with fresh_output(out, KIND, grows=True):
        pass
    with stages.stage("data"):
        overlap = prepare_data(out, held_out, training, old_training)
    with stages.stage("train"):
        facts = train(out, ranks)
    adapter, merged = out / "lora" / "adapter", out / "merged"
    with stages.stage("merge"):
        print(merge(base, adapter, merged))
    with stages.stage("FP8"):
        facts["fp8"] = export_fp8(out, base, merged)
    with stages.stage("score"):
        results, old = score(out, base, adapter, merged)
    facts |= {
        "overlap": overlap,
        "router_sha256": json.loads((adapter / "lora.json").read_text())["router_sha256"],
        "router_unchanged": router_unchanged(adapter, base, merged),
    }
    return report(out, stages, facts, results, old)


def broken_promises(result: dict[str, Any]) -> list[str]:
    """What the demo promises and this result does not keep."""

    def within(model: str, other: str) -> bool:
        low, high = result[f"ci95_{other}"]
        return low <= result[f"{model}_accuracy"] <= high

    kept = {
        "the router is what it was": result["router_unchanged"],
        f"the gain is at least {LEAST_GAIN:.0%}": result["gain"] >= LEAST_GAIN,
        f"the lower end of its 95 % interval is above {LEAST_LOW:.0%}": result["ci95_gain"][0] > LEAST_LOW,
        "the merged model's accuracy lies within the tuned one's interval": within("merged", "tuned"),
        "the FP8 model's accuracy lies within the merged one's interval": within("fp8", "merged"),
        "every reader reads the FP8 folder right, and the certificates hold": not result["fp8"]["problems"],
    }
    return [promise for promise, holds in kept.items() if not holds]


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
    check_output(args.out, KIND)
    started = time.monotonic()
    result = demo(args.out.resolve(), args.ranks, args.held_out, args.training, args.old_training)
    low, high = result["ci95_gain"]
    print(
        f"\n{result['task']}: {result['base_accuracy']:.1%} -> {result['tuned_accuracy']:.1%} on {result['n']} "
        f"held-out questions (95 % interval of the gain {low:+.1%} to {high:+.1%}), "
        f"merged {result['merged_accuracy']:.1%}, FP8 {result['fp8_accuracy']:.1%}, "
        f"{time.monotonic() - started:.0f} s\n"
        f"{args.out / 'report.json'}\n{args.out / 'report.html'}"
    )
    broken = broken_promises(result)
    for promise in broken:
        print(f"FAILED: {promise}")
    return 1 if broken else 0


if __name__ == "__main__":
    run(main)
