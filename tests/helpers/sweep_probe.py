"""A command of this project in a fork that has imported NeMo, its ranks too; by SIGKILL when a trial is far enough.

done_by("tests.helpers.sweep_probe", "never", "recipes/sweep.py", *arguments)
python -m tests.helpers.sweep_probe OUT/trials/2/metrics.jsonl:3 recipes/sweep.py ARGUMENTS     # after three steps
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from launch import local
from tests.helpers.rank_server import CPU_ENVIRONMENT, Job, run_job

NEVER = "never"


def ranks_here(argv: list[str], ranks: int, log_dir: Path, _env: dict[str, str]) -> int:
    """`launch.local.run_ranks`, with forks of this process for ranks."""
    log_dir.mkdir(parents=True, exist_ok=True)
    store = local.rendezvous_store()
    world = {**os.environ, **CPU_ENVIRONMENT, **local.world_of(ranks, store.port)}
    pids = []
    for rank in range(ranks):
        environment = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if (pid := os.fork()) == 0:
            run_job(Job(argv[1], argv[2:], environment, str(log_dir / f"rank{rank}.log")), os.setpgrp)
        pids.append(pid)
    codes = []
    for pid in pids:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        with suppress(ProcessLookupError):  # the process that saving keeps
            os.killpg(pid, signal.SIGKILL)
    return max(codes, key=abs)


def die_when(metrics: Path, steps: int) -> None:
    """SIGKILL to this process, and by that to all that it started, once the file has so many lines."""
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    when, *words = sys.argv[1:]
    local.run_ranks = ranks_here
    if when != NEVER:
        file, _, steps = when.rpartition(":")
        threading.Thread(target=die_when, args=(Path(file), int(steps)), daemon=True).start()
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
