"""Reasoning in four parts, and a second adapter that acts from [VERIFY] on (docs/step_aware.md).

    python recipes/step_aware_lora.py --model MODEL --data STORE --out runs/reasoning
    python conversion/merge_lora.py MODEL runs/reasoning/adapter runs/merged
    python recipes/step_aware_lora.py --model runs/merged --data STORE --out runs/verify \\
        lora.mark=[VERIFY] lora.preset=peft stages.weights=dynamic stages.verify=1
    python recipes/step_aware_lora.py                                   # all of it on pico, two CPU ranks

Teaches to write UNDERSTAND, PLAN and EXECUTE, and then, with those weights frozen, to check them. Data: traces with
stages (data_prep/generate.py --task steps/lists). Cost: on pico see the page; not measured on a GPU.
Result: OUT/adapter; on pico both adapters, the merged model, and OUT/report.json with every measure of three models.
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
from functools import partial
from pathlib import Path
from typing import Any

from finetune import command
from finetune.settings import LogSettings, LoraSettings, Run, Settings, StageSettings, TrainSettings
from finetune.whole_path import fresh_folder, git_commit, train
from launch.plan.layout import Layout
from nano3.arch import resolve_model

KIND, MARK, SEQ_LENGTH, HELD_SEED, TRAINING_SEED = "step-aware-run", "[VERIFY]", 2048, 1, 2


def settings() -> Settings:
    """The reasoning adapter: the published recipe, whose loss leaves VERIFY to the second one."""
    return Settings(stages=StageSettings(weights="fixed", verify=0.0))


def step_aware_lora(run: Run) -> Any:
    """The recipe: the published one, with the settings above."""
    from finetune.configuration import lora_recipe

    return lora_recipe(run)


def pico_reasoning(steps: int) -> Settings:
    """A hot, short run of a small model."""
    return Settings(
        layout=Layout(ep=1),
        lora=LoraSettings(rank=32, alpha=64.0),
        train=TrainSettings(
            steps=steps, warmup=0.03, lr=4e-3, weight_decay=0.0, global_batch=2, seq_length=SEQ_LENGTH, recompute=[]
        ),
        log=LogSettings(every=20, wandb="off", tensorboard=False),
        stages=settings().stages,
    )


def pico_verification(steps: int) -> Settings:
    """The same for the adapter that waits for the mark."""
    changed = pico_reasoning(steps)
    changed.lora = LoraSettings(rank=32, alpha=64.0, preset="peft", mark=MARK)
    changed.stages = StageSettings(weights="dynamic")
    return changed


def prepare_data(out: Path, held: int, training: int, steps: int | None = None, injected: float = 0.5) -> None:
    """Writes held-out questions, OUT/held.jsonl, and the stores OUT/train and OUT/validation of `steps` steps each."""
    from data_prep.overlap import HeldOut, distinct_new
    from data_prep.prepare import prepare
    from data_prep.steps.rows import step_rows
    from nano3.rows import write_rows
    from pico.tasks import conversations

    asked = list(distinct_new(step_rows(2 * held, HELD_SEED, steps), held, None))
    taught = step_rows(2 * training, TRAINING_SEED, steps, injected)
    write_rows(out / "held.jsonl", asked)
    write_rows(out / "train.jsonl", distinct_new(taught, training, HeldOut(conversations(asked))))
    for name, rows in (("train", "train.jsonl"), ("validation", "held.jsonl")):
        prepare([out / rows], resolve_model("pico"), out / name, seq_length=SEQ_LENGTH)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/step_aware"), help="folder to write")
    parser.add_argument("--held-out", type=int, default=150, metavar="N", help="questions to measure (default: 150)")
    parser.add_argument("--training", type=int, default=9000, metavar="N", help="traces to train on (default: 9000)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of reasoning, half as many of VERIFY")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks (default: 2)")
    args = parser.parse_args()
    from conversion.merge_lora import merge
    from evaluation.judging.questions import load_questions
    from evaluation.models import HFModel, beside
    from evaluation.steps import lines, measure_model

    out, pico = fresh_folder(args.out, KIND), resolve_model("pico")
    prepare_data(out, args.held_out, args.training)
    train(out, args.ranks, partial(pico_reasoning, args.steps), step_aware_lora, into="reasoning")
    merged, adapter = out / "merged", out / "verify" / "adapter"
    print(merge(pico, out / "reasoning" / "adapter", merged))
    later = partial(pico_verification, args.steps // 2)
    train(out, args.ranks, later, step_aware_lora, model=str(merged), into="verify")
    questions, found = load_questions(out / "held.jsonl"), dict[str, Any]()
    for name, folder, second in (("pico", pico, None), ("merged", merged, None), ("verifying", merged, adapter)):
        found[name] = measure_model(HFModel(folder, thinking=True, prepare=beside(second, folder)), questions)
        print(f"\n{name}\n" + "\n".join(lines(found[name])))
    (out / "report.json").write_text(json.dumps({"git_commit": git_commit(), **found}, indent=1) + "\n")
    print(f"\nmeasures in {out / 'report.json'}; docs/step_aware.md says what each is")
    return 0


if __name__ == "__main__":
    run(lambda: command.main(__doc__, settings, step_aware_lora) if command.has_data() else main())
