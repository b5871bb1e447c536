"""A process that has imported NeMo once: ranks and probes are forks of it, so a session of tests pays for one import.

    codes = server().run(run_json, FAULT="kill:4")                # the ranks of a training run; fixture `ranks`
    done_by("tests.helpers.model_probe", folder, out)             # one process that needs NeMo or the CPU backend

A fork is a process of its own, with environment, sockets and files of its own. What a test does in it reaches no other.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from finetune.settings import Run
from launch.local import die_with_parent, rendezvous_store, world_of
from nano3.imports import uncollected

ROOT = Path(__file__).resolve().parents[2]
LINGER_SECONDS = 15.0
"""How long ranks may outlive the first that failed."""
CPU_ENVIRONMENT = {"NANO3_CPU": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """`python -m module arguments` with an environment of its own; what it says goes to the file `log`."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    log: str


@cache
def server() -> RankServer:
    """The server of this session; started at the first call, ended with the session."""
    started = RankServer()
    atexit.register(started.close)
    return started


class RankServer:
    """Starts the process and gives it jobs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.rank_server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **CPU_ENVIRONMENT}, cwd=ROOT,
            start_new_session=True, bufsize=0, preexec_fn=die_with_parent,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the server; its forks die with it."""
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()

    def run(self, path: Path, module: str = "finetune.worker", *arguments: str, **environment: str) -> list[int]:
        """Runs `python -m MODULE PATH ARGUMENTS` on as many ranks as the run in PATH asks for.

        Returns the exit codes by rank, minus the signal for a killed one.
        """
        run = Run.from_json(path.read_text())
        return self.ranks(module, [str(path), *arguments], run.ranks, Path(run.out) / "logs", **environment)

    def ranks(self, module: str, arguments: list[str], ranks: int, logs: Path, **environment: str) -> list[int]:
        """The same for any module that joins the process group of its environment; `logs` gets a file for each rank."""
        logs.mkdir(parents=True, exist_ok=True)
        store = rendezvous_store()
        world = {**os.environ, **CPU_ENVIRONMENT, **world_of(ranks, store.port), **environment}
        return self.run_jobs(
            [
                Job(module, arguments, {**world, "RANK": str(n), "LOCAL_RANK": str(n)}, str(logs / f"rank{n}.log"))
                for n in range(ranks)
            ]
        )

    def run_jobs(self, jobs: list[Job]) -> list[int]:
        """Runs the jobs side by side to their end; their exit codes. After the first failure the others are killed."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([asdict(job) for job in jobs]).encode() + b"\n")
        self.process.stdin.flush()
        pids = self._hear()["pids"]
        codes: dict[int, int] = {}
        deadline = float("inf")
        while len(codes) < len(pids):
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                answer = self._hear()
                codes[answer["pid"]] = answer["code"]
                if answer["code"] and deadline == float("inf"):
                    deadline = time.monotonic() + LINGER_SECONDS
            elif time.monotonic() > deadline:
                for pid in set(pids) - set(codes):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
        return [codes[pid] for pid in pids]

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that imports NeMo for all tests has ended; its reason is on stderr"
        return json.loads(line)


def done_by(module: str, *arguments: object, **environment: str) -> str:
    """Runs `python -m MODULE ARGUMENTS` on the CPU backend and returns what it printed. A failure shows the end."""
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        variables = {**os.environ, **CPU_ENVIRONMENT, **environment}
        code = server().run_jobs([Job(module, [str(argument) for argument in arguments], variables, log.name)])
        said = log.read()
    assert code == [0], said[-3000:]
    return said


def run_job(job: Job, separate: Callable[[], Any] = os.setsid) -> None:
    """The fork: becomes the job, in a session of its own, or a group with `os.setpgrp`; never returns."""
    code = 1
    try:
        separate()
        die_with_parent()
        with open(job.log, "ab", buffering=0) as log, open(os.devnull, "rb") as nothing:
            for number, file in enumerate((nothing, log, log)):
                os.dup2(file.fileno(), number)
        os.environ.clear()
        os.environ.update(job.environment)
        sys.argv = [job.module, *job.arguments]
        code = _main(job.module)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(module: str) -> int:
    if module != "finetune.worker":
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    from finetune import worker
    from tests.helpers import faults

    faults.install()
    return worker.main()


def serve(answers: Any) -> None:
    """Forks for every line of jobs, and says how each fork ended."""
    for line in sys.stdin:
        pids = []
        for job in json.loads(line):
            pid = os.fork()
            if pid == 0:
                run_job(Job(**job))
            pids.append(pid)
        print(json.dumps({"pids": pids}), file=answers, flush=True)
        for _ in pids:
            pid, status = os.wait()
            _kill_session(pid)
            print(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


def _kill_session(leader: int) -> None:
    """Ends what a job left: Megatron-Core's saving keeps a process of its own, which outlives a rank that is killed."""
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with uncollected():  # in a fork too: a collection would copy the pages of all that it looks at
        from nano3 import cpu

        cpu.enable()
        import finetune.configuration
        import finetune.eval_only
        import finetune.worker  # noqa: F401  # the expensive part
        from nano3.cpu.compiled import load_compiler

        load_compiler()
    serve(answers)


if __name__ == "__main__":
    main()
