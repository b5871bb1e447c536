"""The checkpoints of a run on disk: OUT/checkpoints/step-NNNNNN, which one is newest, whether it is whole.

Each is an adapter folder (`lora.json`, `weights/`) with `training/` beside it. Imports neither torch nor NeMo, so that
a launcher can refuse a damaged checkpoint, or one of another run, in a tenth of a second.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import Count, Name, check, read_json, shown
from nano3.file_system import UNIQUE, free_disk
from nano3.outputs import put_back
from nano3.sealed_folder import check_seal

FOLDER, BEST = "checkpoints", "best"
"""In a run's folder: its checkpoints, and the adapter of the best validation."""
TRAINING = "training"
STATE = "state.json"
"""In `training/`: step, samples, the identity of the run, and the layout of the ranks that wrote it."""
FORMAT = 2
"""Of `training/`. In format 1 everything but the optimizer's tensors was stored rank by rank."""
_STEP = re.compile(r"step-(\d{6,})")
_LEFT = re.compile(rf"\.step-\d{{6,}}\.(removed|lock|(partial|old)-{UNIQUE})")
"""What a killed run leaves beside its checkpoints."""


class TrainingState(TypedDict):
    """state.json."""

    step: Count
    samples: Count
    layout: dict[Name, Count]
    identity: dict[Name, Any]


def step_folder(out: Path | str, step: int) -> Path:
    """Where the checkpoint after `step` steps lies in the run folder `out`."""
    return Path(out) / FOLDER / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(out: Path | str) -> list[Path]:
    """The checkpoints of the run folder `out`, oldest first. Only whole ones bear the name: they are renamed to it."""
    root = Path(out) / FOLDER
    found = [path for path in root.glob("step-*") if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest(out: Path | str) -> Path | None:
    """The newest checkpoint of `out`, every file of it what was written; None when there is none.

    Raises:
        UserError: the newest one is damaged, or a copy of an older one under its name. Going back to an older one, or
            starting over, is for a person to decide.
    """
    found = checkpoints(out)
    if not found:
        return None
    try:
        check_seal(found[-1], required=True)
        _refuse_other_step(found[-1])
    except UserError as error:
        older = f"from step {step_of(found[-2])}" if len(found) > 1 else "from the beginning: there is no older one"
        raise UserError(
            f"the newest checkpoint is damaged: {error}. Restore the file, or remove the folder {found[-1]} to resume "
            f"{older}"
        ) from None
    return found[-1]


def _refuse_other_step(folder: Path) -> None:
    """Raises `UserError` for a checkpoint that was written after another step than its name says."""
    step = read_state(folder).get("step")
    if step != step_of(folder):
        raise UserError(f"{folder} was written after step {step}: it is a copy, or was renamed")


def read_state(folder: Path) -> dict[str, Any]:
    """`training/state.json` of a checkpoint. Raises `UserError` for one of another format, and for a damaged one."""
    path = folder / TRAINING / STATE
    state = read_json(path, dict[str, Any], "restore the file, or remove the folder to resume from an older checkpoint")
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder} is a checkpoint of format {shown(state.get('format', 1))} and this code reads {FORMAT}: resume "
            "with the version of this repository that wrote it, or start over here with --overwrite"
        )
    check(state, TrainingState, str(path), "restore the file")
    return state


def refuse_other_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raises `UserError` when the checkpoint `folder` belongs to a run with another identity, naming what differs."""
    state = read_state(folder)
    recorded = state["identity"]
    names = [*identity, *(name for name in recorded if name not in identity)]
    different = [name for name in names if recorded.get(name) != identity.get(name)]
    if different:
        what = "; ".join(f"{name} was {recorded.get(name)!r} and is {identity.get(name)!r}" for name in different[:5])
        raise UserError(
            f"{folder} is a checkpoint of another run: {what}. Resume with what it was, choose another --out, or start "
            "over here with --overwrite"
        )


def layout_in_words(layout: Mapping[str, int]) -> str:
    """A checkpoint's or a run's layout for people: `4 ranks (tp=2 ep=2)`."""
    sizes = " ".join(f"{name}={size}" for name, size in layout.items() if name != "ranks" and size > 1)
    return f"{layout['ranks']} rank{'s' if layout['ranks'] > 1 else ''}{sizes and f' ({sizes})'}"


def prune(out: Path | str, keep: int) -> None:
    """Removes all checkpoints but the newest `keep`, which is at least 1."""
    assert keep >= 1, keep
    for old in checkpoints(out)[:-keep]:
        hidden = old.with_name(f".{old.name}.removed")
        os.rename(old, hidden)  # first out of sight, so that a kill while removing leaves no half of it under its name
        shutil.rmtree(hidden)


def clear_unfinished(out: Path | str) -> None:
    """Removes what a killed run left half-written or half-removed, and puts back the best adapter, if it was just being
    replaced. Only while no other run writes to `out`."""
    for hidden in [path for path in (Path(out) / FOLDER).glob(".step-*") if _LEFT.fullmatch(path.name)]:
        hidden.unlink() if hidden.is_file() else shutil.rmtree(hidden, ignore_errors=True)
    (Path(out) / f".{BEST}.lock").unlink(missing_ok=True)  # a server of files may hold it for a node that is gone
    put_back(Path(out) / BEST)


def sync(folder: Path) -> None:
    """Asks the disk to hold everything in `folder` and its name, so that a power cut leaves it whole."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def disk_full(out: Path, needed: int | None) -> UserError:
    """The error for `out` when the disk cannot take it; `needed` bytes, if known."""
    parent, free = free_disk(out)
    wants = f"{needed:,} bytes are needed and " if needed is not None else ""
    return UserError(
        f"the disk is full: {out} could not be written; {wants}{free:,} bytes are free in {parent}. What was saved "
        "before is whole. Free some space, or lower checkpoint.keep, and start the same command again"
    )
