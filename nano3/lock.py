"""One process at a time: a lock on a file, which dies with the process that holds it. Imports neither torch nor NeMo.

It is the kernel's `flock`. Containers and hosts that share a disk see it where the file system passes locks on, as
NFS, GPFS, BeeGFS and Lustre (mounted with `flock`) do. Where it does not, a note says that nobody watches.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nano3.mount import mount_of

LOCK = ".lock"
"""The file that is locked in a folder that stays while its files change."""
_LOCAL = {"localflock", "local_lock=all", "local_lock=flock", "nolock"}
"""Options of network mounts whose locks other hosts do not see."""


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
            _note(file, f"cannot be locked ({error.strerror}): see to it that nothing else writes there")
            return handle
        local = _LOCAL.intersection(mount_of(file.parent).options)
        if local:
            _note(
                file, f"is locked on this host only (mounted with {local.pop()}): see to it that no other writes there"
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


def _note(file: Path, what: str) -> None:
    print(f"note: {file.parent} {what}", file=sys.stderr)
