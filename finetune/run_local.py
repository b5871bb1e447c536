"""Starts a run on this machine's ranks, or goes on with it: what lies in OUT, and what becomes of it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from conversion.identity import drop_record, holds, is_record, record_only
from data_prep.mixture import check_length, size_of
from data_prep.packing import PackedDataset
from finetune.checks import check_run
from finetune.config_file import config_text
from finetune.recipe_file import keep
from finetune.settings import Run
from launch.plan.run_length import RunLength, length_of
from nano3.arch import Arch, is_nemo_checkpoint
from nano3.checkpoints.checkpoint_folder import (
    BEST,
    FOLDER,
    checkpoints,
    clear_unfinished,
    newest,
    refuse_other_run,
    step_of,
)
from nano3.cli import UserError
from nano3.mixture import read_mixture
from nano3.outputs import alone, claim, fresh_file
from nano3.sealed_folder import check_seal

RUN, CONFIG = "run.json", "config.yaml"
"""What a run's folder says of the run: for its ranks, and for people."""
KIND = "lora-run"


def train(run: Run, overwrite: bool = False) -> int:
    """Imports the base weights where needed and runs the recipe on this machine's ranks; returns the exit code.

    Goes on from the newest checkpoint in OUT when there is one and the run is the same (`finetune/run_identity.py`).
    `overwrite` starts over: an adapter in OUT is kept as `adapter.previous`, checkpoints are removed.

    Raises:
        UserError: a finished run, or checkpoints of another one, in OUT without `overwrite`; a damaged checkpoint.
    """
    # Say how long the run is before the import takes its minutes.
    length = length_of_run(run)
    print("\n".join(length.describe()), file=sys.stderr)
    run, out = with_steps(run, length), Path(run.out)
    claim(out, KIND)
    with alone(out, f"another run is writing to {out}; wait for it, or choose another --out"):
        # Alone in OUT: make sure of what lies there, and import the base, before ranks start.
        clear_unfinished(out)
        if overwrite:
            _put_aside(out)
        refuse_finished(out)
        import_base(run)
        _announce(run)
        write_run(run)
        # The ranks read run.json. However they end, say what is left and how to resume.
        started = time.monotonic()
        try:
            code = run_worker(run, out)
        finally:
            if not (out / "adapter" / "lora.json").exists():
                print(f"{_how_to_go_on(out)}; see {out / 'logs'}", file=sys.stderr)
    if not (out / "adapter" / "lora.json").exists():
        return code or 1
    print(f"adapter: {out / 'adapter'} ({time.monotonic() - started:.0f} s)")
    return code


def run_worker(run: Run, folder: Path) -> int:
    """Runs what `folder`/run.json says on this machine's ranks, whose logs go to `folder`/logs; the exit code."""
    from launch.local import run_ranks

    return run_ranks(["-m", "finetune.worker", str(folder / RUN)], run.ranks, folder / "logs", {})


def refuse_finished(out: Path) -> None:
    """Refuses an OUT with an adapter."""
    if (out / "adapter").exists():
        raise UserError(f"{out} holds a finished run; choose another --out, or run again there with --overwrite")


def _put_aside(out: Path) -> None:
    """Makes room for a new run: the finished adapter stays as `adapter.previous`."""
    for old in (FOLDER, BEST, "evaluation", "tensorboard", "wandb"):
        shutil.rmtree(out / old, ignore_errors=True)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    if (out / "adapter").exists():
        shutil.rmtree(out / "adapter.previous", ignore_errors=True)
        os.rename(out / "adapter", out / "adapter.previous")
        print(f"the adapter of the last run is now {out / 'adapter.previous'}", file=sys.stderr)


def import_base(run: Run) -> None:
    """Converts the Hugging Face folder into OUT/base, unless OUT/base was made from it and it has not changed. With
    `lora.base=nf4` the ranks read the folder itself, and OUT/base says only which weights it has."""
    base, model = Path(run.base), Path(run.model)
    if not run.own_base:
        return
    if not list(model.glob("*.safetensors")):
        raise UserError(
            f"{model} has no weights; give --model FOLDER, the downloaded model, or --dry-run to see the recipe"
        )
    if base.exists() and not is_record(base) and holds(base, model):
        return
    if run.nf4:
        record_only(base, model)
        return
    drop_record(base)
    from conversion.hf_to_nemo import convert

    print("importing the base weights ...", file=sys.stderr)
    convert(model, base, context=False)


def check_base(run: Run, contents: bool = True) -> None:
    """Refuses a base that the run does not import itself and that is no NeMo checkpoint of its model, or not what was
    imported."""
    base = Path(run.base)
    if run.own_base:
        return
    if not is_nemo_checkpoint(base):
        raise UserError(f"{base} is no NeMo checkpoint: make it with conversion/hf_to_nemo.py {run.model} {base}")
    if Arch.load(base / "hf") != Arch.load(run.model):
        raise UserError(f"{base} is of another architecture than {run.model}; give the model that it was made from")
    if contents:
        check_seal(base, required=True)


def check_data(run: Run, arch: Arch, contents: bool = True) -> None:
    """Stores and base are there and fit: packs of this length exist, every token is in the vocabulary, the architecture
    is the model's. Raises `UserError`.

    `contents`: everything in them is what was written. On the machine that trains, not where a job is only submitted:
    what is not known there to be unchanged is read.
    """
    check_base(run, contents)
    if not run.data and not run.eval_only:
        raise UserError("no data: give --data STORE, a token store made by data_prep/prepare.py")
    train, multiple = run.settings.train, run.settings.document_multiple
    mixture = read_mixture(run.data) if run.data else None
    trains = not run.eval_only
    stores = [(store, mixture.curriculum, trains) for store in mixture.stores] if mixture else []
    if run.validation:
        stores.append((Path(run.validation), None, False))
    for store, curriculum, trained_on in stores:
        packs = PackedDataset(store, train.seq_length, multiple, curriculum)
        if contents:
            packs.check_contents()
        packs.store.check_tokenizer(run.model)
        if trained_on:
            packs.store.check_trainable()
        packs.store.check_vocabulary(arch.vocab_size)
    if run.data and trains and train.steps is not None:
        check_length(run.data, train.seq_length, multiple, train.steps, train.global_batch)


def last_checkpoint(run: Run) -> Path | None:
    """The checkpoint that the run goes on from, None at the beginning; the base must be imported.

    Raises:
        UserError: it is damaged, or belongs to another run.
    """
    from finetune.run_identity import run_identity

    last = newest(run.out)
    if last is not None:
        refuse_other_run(last, run_identity(run.to_json()))
    return last


def _announce(run: Run) -> None:
    """Says where the run begins; refuses checkpoints that are damaged or of another run."""
    out, last = Path(run.out), last_checkpoint(run)
    where = f", resuming after step {step_of(last)}" if last else ""
    for old in ("logs", "nemo"):
        shutil.rmtree(out / old, ignore_errors=True)
    kind = "CPU" if run.cpu else "GPU"
    print(f"training on {run.ranks} {kind} ranks{where}; logs in {out / 'logs'}", file=sys.stderr)


def _how_to_go_on(out: Path) -> str:
    """What a run that ended early leaves, in words."""
    found = checkpoints(out)
    if not found:
        return "the run ended early and wrote no adapter and no checkpoint: the same command starts from the beginning"
    return (
        f"the run ended early and wrote no adapter: the same command resumes after step {step_of(found[-1])} "
        f"({found[-1]})"
    )


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
    return length_of(train, size_of(run.data, train.seq_length, run.settings.document_multiple), run.data)


def with_steps(run: Run, length: RunLength) -> Run:
    """The run with its number of steps, that of its `length` where none was given, and checked with it."""
    if run.settings.train.steps is not None:
        return run
    train = replace(run.settings.train, steps=length.steps, epochs=None)
    run = replace(run, settings=replace(run.settings, train=train))
    check_run(run, Arch.load(run.model))
    return run
