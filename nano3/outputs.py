"""Output folders and files that appear whole or not at all, and what a killed writer left of them.

What is not an output yet, or no longer, lies beside it under a hidden name, which `nano3.file_system.is_transient`
knows: `.NAME.partial-*` while it is written or removed, `.NAME.old-*` for the blink between two renames,
`.NAME.scratch-*` for what is needed on the way, and locks. The next writer of the same output clears it away, or puts
it back.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nano3.errors import UserError
from nano3.file_system import LOCK, UNIQUE, is_abandoned, locked, remove_folder, unique
from nano3.sealed_folder import MARKER, came_later, is_ours, mark, owner_of, seal


def check_output(out: Path | str, kind: str) -> Path:
    """Refuses an output path that holds something we did not write; an empty or absent folder, or our own, is fine."""
    out = check_claim(out, kind)
    if out.is_mount():
        raise UserError(
            f"output {out} is where a disk is mounted, which no folder can replace; give a folder inside it"
        )
    later = came_later(out)
    if later:
        raise UserError(
            f"output folder {out} holds {later[0]}, which its tool did not write and would remove; move it, or choose "
            "another folder"
        )
    return out


def check_claim(out: Path | str, kind: str) -> Path:
    """`check_output` for a folder that is not replaced, but whose files change while it stays."""
    out = Path(out).resolve()
    if out.is_file():
        raise UserError(f"output {out} is a file; give a folder that does not exist yet")
    if out.is_dir() and not is_ours(out, kind):
        raise UserError(
            f"output folder {out} exists and holds files that are not a {kind} of this project; "
            "choose another folder or remove it"
        )
    return out


def claim(out: Path | str, kind: str) -> Path:
    """Makes the folder `out`, whose files change while it stays, one of `kind`, unless it is one. Returns its path.

    Raises `UserError` where it holds something else.
    """
    out = check_claim(out, kind)
    if owner_of(out) != kind:
        out.mkdir(parents=True, exist_ok=True)
        mark(out, kind)
    return out


@contextmanager
def alone(folder: Path, refusal: str, patience: float = 0) -> Iterator[None]:
    """Holds the lock of a folder whose files change while it stays, and which is there (`claim`). `UserError` with the
    text `refusal` while another process holds it, after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        with locked(folder / LOCK) as mine:
            if mine:
                yield
                return
        if time.monotonic() >= end:
            raise UserError(refusal)
        time.sleep(0.1)


@contextmanager
def fresh_output(out: Path | str, kind: str, grows: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside `out`; on success it replaces `out`, on an error nothing of it stays.

    The finished folder carries `nano3.json` with its `kind`, so that a second run may replace it and a stranger's
    folder is never touched, and the hashes of its files (`nano3.sealed_folder`), unless it `grows` from then on.

    A killed run leaves the old result or the new one, under its name or, for the blink between two renames, as a hidden
    `.NAME.old-*` that the next run puts back; and at most a hidden `.NAME.partial-*`, which no reader accepts and the
    next run removes.
    """
    out = check_output(out, kind)
    with only_writer(out):
        check_output(out, kind)  # what a kill had left is back
        temporary = _hidden_beside(out, "partial")
        temporary.mkdir()
        try:
            mark(temporary, kind)
            yield temporary
            if not grows:
                seal(temporary)
            replace_folder(temporary, out)
        except BaseException:
            _remove(temporary)
            raise


@contextmanager
def fresh_file(out: Path | str) -> Iterator[Path]:
    """Gives a temporary file name beside `out`; on success the file replaces `out`, on an error nothing of it stays."""
    with fresh_files(out) as (temporary,):
        yield temporary


@contextmanager
def fresh_files(out: Path | str, *beside: Path | str) -> Iterator[list[Path]]:
    """`fresh_file` for a file and those `beside` it that speak of it. A kill leaves none of an older run beside one of
    this: the old ones go before `out` is replaced, and theirs come after it. `UserError` where one is a folder."""
    places = [Path(place).resolve() for place in (out, *beside)]
    for place in places:
        if place.is_dir():
            raise UserError(f"output {place} is a folder; give a file name")
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(only_writer(place))
        temporaries = [_hidden_beside(place, "partial") for place in places]
        try:
            yield temporaries
            for place in places[1:]:
                place.unlink(missing_ok=True)
            for temporary, place in zip(temporaries, places, strict=True):
                os.replace(temporary, place)
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output `out`, for what is needed on the way to it. Each process has one of its own;
    what killed ones left is removed."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_scratch(out)
    while True:
        scratch = _hidden_beside(out, "scratch")
        with locked(_lock_of(scratch), remove=True) as mine:
            if not mine:  # another process takes it for one that was left, just now
                continue
            try:
                scratch.mkdir()
                mark(scratch, "scratch")
                yield scratch
            finally:
                _remove(scratch)
            return


def _clear_scratch(out: Path) -> None:
    """Removes the scratch folders of processes that ended: nobody holds their locks, which were there before them."""
    name = re.compile(rf"(\.{re.escape(out.name)}\.scratch-{UNIQUE})(\.lock)?")
    for left in {match[1] for path in out.parent.iterdir() if (match := name.fullmatch(path.name))}:
        scratch = out.parent / left
        if is_abandoned(_lock_of(scratch)):
            if scratch.is_dir() and is_ours(scratch):
                _remove(scratch)
            with suppress(OSError):
                _lock_of(scratch).unlink(missing_ok=True)


def _lock_of(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}.lock")


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Nobody else writes the output `out` meanwhile, on this host or on others that share the disk.

    What a killed writer left beside it is put back or removed. The lock: `nano3.file_system`.

    The lock is a hidden file `.NAME.lock` beside it. `UserError` while another process holds it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent / f".{out.name}.lock", remove=True) as mine:
        if not mine:
            raise UserError(f"another process is writing {out}; wait for it, or choose another output")
        _tidy(out)
        yield


def put_back(out: Path) -> None:
    """Puts back the output `out` that a killed writer was replacing, and removes what else it left."""
    with only_writer(out):
        pass


def replace_folder(new: Path, out: Path) -> None:
    """Renames `new` to `out`, in place of the folder there; that one comes back when the renaming fails."""
    old = _hidden_beside(out, "old")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(new, out)
    except BaseException:
        if old.exists():
            os.rename(old, out)
        raise
    if old.exists():
        discard(old, out)


def discard(folder: Path, out: Path) -> None:
    """Removes a folder of ours that lies beside the output `out`: out of sight first, so that a kill while it goes
    leaves no half of it under its name."""
    going = _hidden_beside(out, "partial")
    os.rename(folder, going)
    _remove(going)


def _hidden_beside(out: Path, what: str) -> Path:
    """A name that nobody has, for what is `partial` or `old` of the output `out`."""
    return out.parent / f".{out.name}.{what}-{unique()}"


def _tidy(out: Path) -> None:
    """Puts back what a killed run left half-replaced and removes what it left half-written.

    Who holds the lock of `out` is its only writer, so whatever else has one of these names is of a run that ended.
    """
    for what in ("old", "partial"):
        name = re.compile(rf"\.{re.escape(out.name)}\.{what}-{UNIQUE}")
        for left in [path for path in out.parent.iterdir() if name.fullmatch(path.name)]:
            if left.is_file():
                left.unlink()
            elif not is_ours(left):
                continue
            elif what == "partial":
                _remove(left)
            elif out.exists():
                discard(left, out)
            else:
                os.rename(left, out)


def _remove(hidden: Path) -> None:
    """Removes a hidden folder, or leaves what cannot be removed to the next run."""
    with suppress(OSError):
        remove_folder(hidden, MARKER)
