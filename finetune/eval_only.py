"""`--eval-only`: loss and token accuracy on a validation store, of the base or of base and adapter. Nothing is trained.

Model, data and layout are those of the run's own recipe, of which this is a variant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.run_local import KIND, import_base, run_worker, write_run
from finetune.settings import Run
from nano3.cli import UserError
from nano3.documents import read_json
from nano3.outputs import claim
from nano3.ranges import MOST_STEPS
from nano3.sealed_folder import check_seal

RESULTS = "results.json"
FOLDER = "evaluation"
"""In OUT: the run's JSON, logs and results."""


def evaluation_run(run: Run, adapter: str | None) -> Run:
    """The run that evaluates: `adapter` is a folder, `none` for the base alone, None for OUT/adapter if there is one.

    Raises:
        UserError: no validation store, or no adapter in the folder.
    """
    if run.validation is None:
        raise UserError("--eval-only needs --validation STORE, a token store made by data_prep/prepare.py")
    folder = Path(adapter) if adapter else Path(run.out) / "adapter"
    run = replace(run, eval_only=True, data="")  # nothing trains, so no packs of it need be there
    if run.settings.train.steps is None:  # none is taken, but the configuration has a number
        train = replace(run.settings.train, steps=MOST_STEPS, epochs=None)
        run = replace(run, settings=replace(run.settings, train=train))
    if adapter == "none" or (adapter is None and not folder.exists()):
        return run
    if not (folder / "lora.json").is_file():
        raise UserError(f"--adapter {folder} has no lora.json; give an adapter folder that training wrote, or none")
    check_seal(folder, required=True)
    return replace(run, adapter=str(folder.resolve()))


def evaluate(run: Run) -> int:
    """Runs the evaluation on this machine's ranks and prints its results; returns the exit code."""
    out = Path(run.out)
    claim(out, KIND)
    import_base(run)
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / RESULTS).unlink(missing_ok=True)
    write_run(replace(run, out=str(folder)))
    print(f"evaluating {run.adapter or 'the base'} on {run.ranks} ranks; logs in {folder / 'logs'}", file=sys.stderr)
    code = run_worker(run, folder)
    if not (folder / RESULTS).exists():
        return code or 1
    print(summary(read_json(folder / RESULTS, dict[str, Any])))
    print(f"results: {folder / RESULTS}", file=sys.stderr)
    return code


def summary(results: dict[str, Any]) -> str:
    """The results in a line."""
    return (
        f"validation loss {results['validation_loss']:.4f}, token accuracy {results['validation_accuracy']:.2%} "
        f"over {results['packs']} packs of {results['validation']} ({results['adapter'] or 'the base, no adapter'})"
    )


def evaluation_recipe(run: Run, recipe: Callable[[Run], Any]) -> Any:
    """The NeMo 2 configuration of an evaluation, a `nemo_run.Partial` of `llm.validate`; the training `recipe`'s parts.

    Raises:
        UserError: the recipe is no configuration of NeMo, so there are no parts to take from it.
    """
    training = recipe(run)  # first: it switches the CPU backend on before NeMo is imported

    # isort: split
    import nemo_run
    from nemo.collections import llm

    from nano3.checkpoints.adapter_checkpoint import SaveAdapter
    from nano3.training.evaluation import Evaluation
    from nano3.training.supervised import Supervision

    if not isinstance(training, nemo_run.Partial):
        name = run.recipe.name if run.recipe else recipe.__name__
        raise UserError(f"--eval-only: the recipe {name} has no NeMo configuration; evaluate with nemotron_lora.py")
    (saver,) = [part for part in training.trainer.callbacks if part.__fn_or_cls__ is SaveAdapter]
    training.data.train = None
    training.trainer.callbacks = [
        *(part for part in training.trainer.callbacks if part.__fn_or_cls__ is Supervision),
        nemo_run.Config(
            Evaluation,
            results=str(Path(run.out) / RESULTS),
            adapter=run.adapter,
            base=saver.base,
            facts=saver.facts,
        ),
    ]
    return nemo_run.Partial(
        llm.validate,
        model=training.model,
        data=training.data,
        trainer=training.trainer,
        log=training.log,
        resume=training.resume,
        model_transform=training.peft if run.adapter else None,
    )
