"""What a file system promises: which one a path lies on, how much of it is free, one process at a time, names that
nobody else has, and folders that go so that a kill does not make them a stranger's. Imports neither torch nor NeMo.

A lock on a file dies with the process that holds it. It is the kernel's `flock`. Containers and hosts that share a disk
see it where the file system passes locks on, as NFS, GPFS, BeeGFS and Lustre (mounted with `flock`) do. Where it does
not, a note says that nobody watches.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LOCK = ".lock"
"""The file that is locked in a folder that stays while its files change."""
UNIQUE = r"\d+-[0-9a-f]{8}"
"""How what `unique` gives looks, as a regular expression."""
_TRANSIENT = re.compile(rf"\.lock|\..+\.lock|\..+\.(partial|old|scratch)-{UNIQUE}")
_LOCAL = {"localflock", "local_lock=all", "local_lock=flock", "nolock"}
"""Options of network mounts whose locks other hosts do not see."""


@dataclass(frozen=True)
class Mount:
    """Where it is mounted, its kind (ext4, nfs4, lustre, ...), the disk or `server:/export` behind it, its options."""

    point: str
    kind: str
    source: str
    options: tuple[str, ...]


def mount_of(path: Path) -> Mount:
    """The mount that a path lies in; of an unknown kind where the system does not say."""
    real = str(path.resolve())
    inside = [mount for mount in _mounts() if real == mount.point or real.startswith(mount.point.rstrip("/") + "/")]
    return max(inside, key=lambda mount: len(mount.point), default=Mount("/", "unknown", "", ()))


@cache
def _mounts() -> tuple[Mount, ...]:
    """The kernel's list; a later line hides an earlier one of the same place."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ()
    found: dict[str, Mount] = {}
    for line in lines:
        first, _, last = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), first.split()[4])
        kind, source, options = last.split(" ", 2)
        found[point] = Mount(point, kind, source, tuple(f"{first.split()[5]},{options}".split(",")))
    return tuple(found.values())


def free_disk(path: Path) -> tuple[Path, int]:
    """The nearest folder above `path`, or itself, that exists, and the bytes that are free on its disk."""
    path = path.resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return there, shutil.disk_usage(there).free


@contextmanager
def locked(file: Path, remove: bool = False) -> Iterator[bool]:
    """Whether nobody else holds the lock on `file`, which is made and, with `remove`, goes when the lock does.

    A file system without locks, or with locks that other hosts do not see, is no reason to refuse: a note on stderr
    says so.
    """
    handle = _take(file)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            if remove:
                file.unlink(missing_ok=True)  # first: whoever waits for the lock sees that its file is gone
            _let_go(handle)


def unique() -> str:
    """An ending for a name that no other process has, on no host."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


def is_transient(name: str) -> bool:
    """Whether a file or folder of this name may be a lock of ours, or something that is not finished or about to go."""
    return _TRANSIENT.fullmatch(name) is not None


def remove_folder(folder: Path, *last: str) -> None:
    """Removes a folder. The files in it that are named in `last`, which say whose it is, go when nothing else is left,
    in that order: when a kill comes before that, the next run still knows that it may remove the rest.

    Raises:
        OSError: something cannot be removed, or came meanwhile; the files of `last` are still there.
    """
    for path in [path for path in folder.iterdir() if path.name not in last]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if any(path.name not in last for path in folder.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
    for name in last:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def is_abandoned(file: Path) -> bool:
    """Whether surely nobody holds the lock on a file. Not where locks cannot be relied on, or the file is another
    user's."""
    try:
        handle = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return not _LOCAL.intersection(mount_of(file.parent).options)


def _take(file: Path) -> int | None:
    """The open file, locked; None while another process holds it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            _note(file.parent, f"cannot be locked ({error.strerror}): see to it that nothing else writes there")
            return handle
        local = _LOCAL.intersection(mount_of(file.parent).options)
        if local:
            _note(
                file.parent,
                f"is locked on this host only (mounted with {local.pop()}): see to it that no other writes there",
            )
        try:
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # who held it removed it in between: this is the lock of a file that is gone


def _let_go(handle: int) -> None:
    """Unlocks for helper processes too, which were forked with the file open."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


@cache
def _note(folder: Path, what: str) -> None:
    """Says it once in a process: a run writes there again and again."""
    print(f"note: {folder} {what}", file=sys.stderr)
