"""What a run's folder says of the run: run.json for its ranks, config.yaml for people, and the recipe's own file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_prep.mixture import size_of
from finetune.checks import check_run
from finetune.config_file import config_text
from finetune.recipe_file import keep
from finetune.settings import Run
from launch.plan.run_length import RunLength, length_of
from nano3.arch import Arch
from nano3.cli import UserError, fresh_file

RUN, CONFIG = "run.json", "config.yaml"


def write_run(run: Run) -> None:
    """Writes what starts the run into its folder, run.json last.

    Raises:
        UserError: the recipe's file has changed since the command read it.
    """
    if run.recipe is not None:
        keep(run.recipe, Path(run.out))
    write_settings(run)


def write_settings(run: Run) -> None:
    """Writes config.yaml and run.json into the run's folder."""
    for name, text in ((CONFIG, config_text(run)), (RUN, run.to_json() + "\n")):
        with fresh_file(Path(run.out) / name) as temporary:
            temporary.write_text(text)


def length_of_run(run: Run) -> RunLength:
    """Rows, packs, passes and steps of a run whose store is there. Raises `UserError` for a store without its packs."""
    train = run.settings.train
    size = size_of(run.data, train.seq_length, run.settings.document_multiple)
    if size.by_epochs and train.steps is None:
        if train.epochs is not None:
            raise UserError(f"{run.data} says epochs of its stores: leave train.epochs={train.epochs:g} out")
        train = replace(train, epochs=1.0)
    return length_of(train, size.rows, size.packs)


def with_steps(run: Run) -> Run:
    """The run with its number of steps, derived from its store where that was not given, and checked with it."""
    if run.settings.train.steps is not None:
        return run
    train = replace(run.settings.train, steps=length_of_run(run).steps, epochs=None)
    run = replace(run, settings=replace(run.settings, train=train))
    check_run(run, Arch.load(run.model))
    return run
