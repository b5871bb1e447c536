"""From prepared stores to a report: train, merge, FP8, greedy answers of every model, scored; for recipes/demo.py."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.recipe_file import recipe_of
from finetune.setting_sentences import text_of
from finetune.settings import Run, Settings
from nano3.cli import UserError
from nano3.outputs import check_output, fresh_output
from nano3.overrides import flatten

CALIBRATION_SAMPLES = 256
"""Training documents that set FP8's scales."""
LEAST_GAIN, LEAST_LOW = 0.30, 0.15
"""What the demo promises: below this it fails, since then something on the path is broken."""


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


def fresh_folder(out: Path, kind: str) -> Path:
    """An empty folder for a demo's results, which grows from now on; an older one of the same kind is replaced."""
    out = check_output(out, kind)
    with fresh_output(out, kind, grows=True):
        pass
    return out


def train(
    out: Path,
    ranks: int,
    defaults: Callable[[], Settings],
    recipe: Callable[[Run], Any],
    data: str = "train",
    model: str = "pico",
    into: str = "lora",
) -> dict[str, Any]:
    """Trains pico, or a `model` made of it, with a recipe on CPU ranks, from OUT/DATA into a folder of OUT; returns
    what the report says about it."""
    from finetune import command
    from nano3.training.journal import read_rows

    flags = ["--model", model, "--local", "--ranks", str(ranks), "--out", str(out / into)]
    flags += ["--data", str(out / data), "--validation", str(out / "validation")]
    run, arch = command.resolve(command.parser().parse_args(flags), defaults, recipe_of(recipe))
    code = command.train(run, arch)
    if code:
        raise SystemExit(code)
    metrics = read_rows(out / into / "metrics.jsonl")
    layout, plain = run.settings.layout, flatten(Settings())
    chosen = {key: text_of(value) for key, value in flatten(defaults()).items() if value != plain[key]}
    return {
        "metrics": metrics,
        "train_tokens": sum(row.get("tokens", 0) for row in metrics),
        "layout": {name: getattr(layout, name) for name in ("tp", "pp", "cp", "ep", "etp")} | {"ranks": ranks},
        "adapter_parameters": command.trainable_parameters(run, arch),
        "settings": chosen,
    }


def router_unchanged(adapter: Path, *folders: Path) -> bool:
    """Whether the routers of these Hugging Face folders are, bit for bit, those that training hashed at its end."""
    from conversion.adapters.adapter_folder import Adapter
    from conversion.checkpoint.model_folder import HFFolder

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
    from evaluation.evaluate import evaluate_model
    from evaluation.judging.questions import load_questions
    from evaluation.models import identity_of
    from evaluation.result_file import write_result

    models = {"base": base, "tuned": base, "merged": merged, "fp8": out / "fp8-plain"}
    results: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for name, folder in models.items():
        prepare = with_adapter(adapter, base) if name == "tuned" else None
        identity = identity_of(out / "fp8" if name == "fp8" else folder, adapter if prepare else None)
        for questions in ("held_out", "old_tasks"):
            asked = load_questions(out / f"{questions}.jsonl")
            result = evaluate_model(folder, asked, prepare=prepare, identity=identity)
            write_result(result, out / f"{name}_{questions}.json")
            if questions == "held_out":
                results[name] = result
            else:
                for task, part in result["by_source"].items():
                    old.setdefault(task, {"n": part["n"]})[name] = part["accuracy"]
    return results, old


def git_commit() -> str:
    """The commit that ran, `unknown` outside a git checkout; `+changes` when files differ from it."""
    root = Path(__file__).resolve().parents[1]
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def report(
    out: Path, task: str, stages: Stages, facts: dict[str, Any], results: dict[str, Any], old: dict[str, Any]
) -> dict[str, Any]:
    """Writes report.json and report.html; returns the report."""
    from evaluation.comparison import compare
    from evaluation.tuning_report import examples_from, write_report

    metrics = facts.pop("metrics")
    content = {
        "task": task,
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


def whole_path(
    out: Path, base: Path, task: str, stages: Stages, train: Callable[[], dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Runs `train`, then merge, FP8 and scoring in the folder `out`, which has the stores; returns the report."""
    from conversion.adapters.lora_json import read_lora_json
    from conversion.merge_lora import merge

    with stages.stage("train"):
        facts = {**train(), **facts}
    adapter, merged = out / "lora" / "adapter", out / "merged"
    with stages.stage("merge"):
        print(merge(base, adapter, merged))
    with stages.stage("FP8"):
        facts["fp8"] = export_fp8(out, base, merged)
    with stages.stage("score"):
        results, old = score(out, base, adapter, merged)
    facts |= {
        "router_sha256": read_lora_json(adapter).router_sha256,
        "router_unchanged": router_unchanged(adapter, base, merged),
    }
    return report(out, task, stages, facts, results, old)


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
