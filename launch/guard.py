"""Ends every process of a run when the run's launcher has ended, however it ended; standard library only.

    python launch/guard.py RUN_ID < pipe

`launch/local.py` starts it with a pipe whose other end only the launcher holds, so the kernel closes it even after
`kill -9`. Processes of the run are known by TORCHELASTIC_RUN_ID in their environment, which what ranks start inherits:
helpers that write checkpoints or send metrics outlive a killed rank otherwise.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 10.0
"""How long it looks for processes that others start meanwhile."""


VARIABLE = "TORCHELASTIC_RUN_ID"
"""What every process of a run has in its environment."""


def processes_of(value: str, variable: str = VARIABLE) -> list[int]:
    """Processes with this value in their environment, of a run by default, that are alive and that we may end."""
    wanted, found = f"{variable}={value}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if wanted in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def end_processes(run_id: str) -> None:
    """Ends them all, again until none is left: one may have started another meanwhile."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and (left := processes_of(run_id)):
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever ends the launcher's group ends the launcher
    sys.stdin.buffer.read()
    end_processes(sys.argv[1])


if __name__ == "__main__":
    main()
