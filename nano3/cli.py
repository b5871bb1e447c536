"""What every script here shares: one-line errors with exit code 2, and output folders that appear whole or not at all.

Imports neither torch nor NeMo: scripts must be able to refuse bad input before anything heavy loads.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "nano3.json"
"""File that says a folder was written by this project, and by which of its tools."""


class UserError(ValueError):
    """A mistake that the user can mend. The message names the thing and the remedy; scripts then exit with 2."""


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` as a script: exit code 0 or its own, 130 for Ctrl-C, 2 with one line for a `UserError` and for a
    file that cannot be read or written.

    Libraries' warnings about their own dependencies are left out, here and in processes that are started from here;
    PYTHONWARNINGS brings them back.
    """
    if "PYTHONWARNINGS" not in os.environ:
        os.environ["PYTHONWARNINGS"] = "ignore"
        warnings.simplefilter("ignore")
    try:
        sys.exit(main() or 0)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # who read has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _nobody_reads() -> bool:
    """Whether the reader of our stdout is gone; another pipe may break too, and that is an error."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def free_disk(path: Path) -> tuple[Path, int]:
    """The nearest folder above `path`, or itself, that exists, and the bytes that are free on its disk."""
    path = path.resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return there, shutil.disk_usage(there).free


def owner_of(folder: Path) -> str | None:
    """The kind of a folder that this project wrote (see `fresh_output`), or None when it is not ours."""
    try:
        return json.loads((folder / MARKER).read_text())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_output(out: Path | str, kind: str) -> Path:
    """Refuses an output path that holds something we did not write; an empty or absent folder, or our own, is fine."""
    out = Path(out).resolve()
    if out.is_file():
        raise UserError(f"output {out} is a file; give a folder that does not exist yet")
    if out.is_mount():
        raise UserError(
            f"output {out} is where a disk is mounted, which no folder can replace; give a folder inside it"
        )
    if out.is_dir() and any(out.iterdir()) and owner_of(out) != kind:
        raise UserError(
            f"output folder {out} exists and holds files that are not a {kind} of this project; "
            "choose another folder or remove it"
        )
    return out


@contextmanager
def fresh_output(out: Path | str, kind: str) -> Iterator[Path]:
    """Gives a temporary folder beside `out`; on success it replaces `out`, on an error nothing of it stays.

    The finished folder carries `nano3.json` with its `kind`, so that a second run may replace it and a stranger's
    folder is never touched. A killed run leaves the old result or the new one, under its name or, for the blink between
    two renames, as a hidden `.NAME.old-*` that the next run puts back; and at most a hidden `.NAME.partial-*`, which no
    reader accepts and the next run removes.
    """
    out = check_output(out, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    tidy(out)
    temporary = out.parent / f".{out.name}.partial-{_mine()}"
    temporary.mkdir()
    try:
        yield temporary
        (temporary / MARKER).write_text(json.dumps({"kind": kind, "format": 1}) + "\n")
        replace_folder(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: Path, out: Path) -> None:
    """Renames `new` to `out`, in place of the folder there; that one comes back when the renaming fails."""
    old = out.parent / f".{out.name}.old-{_mine()}"
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(new, out)
    except BaseException:
        if old.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def fresh_file(out: Path | str) -> Iterator[Path]:
    """Gives a temporary file name beside `out`; on success the file replaces `out`, on an error nothing of it stays."""
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    tidy(out)
    temporary = out.parent / f".{out.name}.partial-{_mine()}"
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def hidden_prefix(out: Path) -> str:
    """What a temporary folder's name beside `out` begins with, so that after a kill `tidy` removes it."""
    return f".{out.name}.partial-{os.getpid()}-"


def _mine() -> str:
    """The end of a hidden name: our process, and a number of its own."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


def tidy(out: Path) -> None:
    """Puts back what a killed run left half-replaced and removes what it left half-written; a live run's stays."""
    for old in out.parent.glob(f".{out.name}.old-*"):
        if _ended(old):
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(old, out)
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        if _ended(stale):
            stale.unlink() if stale.is_file() else shutil.rmtree(stale, ignore_errors=True)


def _ended(hidden: Path) -> bool:
    """Whether the process that made this hidden file or folder is gone; its number stands in the name."""
    try:
        os.kill(int(hidden.name.rsplit("-", 2)[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        return False
    return False
