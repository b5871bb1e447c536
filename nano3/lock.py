"""One process at a time in a folder. Imports neither torch nor NeMo."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nano3.cli import UserError

LOCK = ".lock"
"""The file in the folder that is locked. It stays; the lock itself dies with the process, however that dies."""


@contextmanager
def alone(folder: Path, refusal: str) -> Iterator[None]:
    """Holds the lock of an existing folder.

    A file system that has no locks is no reason to refuse: then a note on stderr says that nobody watches.

    Raises:
        UserError: `refusal`, while another process holds it.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        except OSError as error:
            print(
                f"note: {folder} cannot be locked ({error.strerror}): see to it that nothing else writes there",
                file=sys.stderr,
            )
        yield
