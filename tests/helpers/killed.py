"""Work that is killed with SIGKILL: after a time, at any moment of its own, or at every change of the disk in turn."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

CHANGES = {
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
}
"""Audit events of calls that change the disk -> which arguments are the path that changes, and the open folder that it
is relative to (-1: none). `open` is looked at itself. Python sees no files that compiled code opens, and nothing of
processes that are started."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def killed(run: Callable[[], object], after: float | None = None) -> bool:
    """Runs it in a process of its own, which is killed after so many seconds, or kills itself; whether it was."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            run()
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def at_every_change(run: Callable[[], object], folder: Path) -> Iterator[str]:
    """Kills `run` right before its first change of the disk in `folder`, then, when it is called again, its second.

    A file that is opened for writing is a moment more: it is there and empty. Yields what the killed process was about
    to do; whoever takes it must bring the folder back to where it was. Ends with the first `run` that comes to its end,
    which must be without an error, and with as many moments as were tried.
    """
    for moment in itertools.count(1):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                killer = _Killer(folder, moment, write)
                sys.addaudithook(killer)
                run()
                assert killer.left == 1, f"{moment - killer.left} moments where {moment - 1} were tried"
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as told:
            event = told.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            assert code == 0
            return
        yield event


class _Killer:
    """An audit hook that kills its process at one of the moments at which the disk changes below a folder."""

    def __init__(self, folder: Path, moment: int, told: int) -> None:
        self.folder, self.left, self.told, self.lock = str(folder), moment, told, threading.Lock()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and flags & _WRITES and self._inside(path):
                self._moment(f"open {path}")
                if self.left == 1:
                    self.left = 0  # what this opens is no moment
                    with suppress(OSError):  # which the work will meet itself
                        os.close(os.open(path, flags, 0o666))
                    self.left = 1
                self._moment(f"write {path}")
        elif event in CHANGES:
            path, parent = (arguments[number] for number in CHANGES[event])
            if parent != -1:
                path = os.path.join(os.readlink(f"/proc/self/fd/{parent}"), path)
            if self._inside(path):
                self._moment(f"{event} {path}")

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fspath(path)).startswith(self.folder + os.sep)

    def _moment(self, what: str) -> None:
        with self.lock:  # threads write too
            self.left -= 1
            mine = self.left == 0
        if mine:
            os.write(self.told, what.encode())
            os.kill(os.getpid(), signal.SIGKILL)
