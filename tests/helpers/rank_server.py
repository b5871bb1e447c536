"""Ranks that have imported NeMo once: every run is a fork of them, so a test that starts ten runs pays for one import.

    with RankServer(2) as ranks:
        codes = ranks.run(run_json, FAULT="...")

A fork is a process of its own, with sockets and files of its own; it runs `finetune.worker` as any rank does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.settings import Run
from launch.local import _rendezvous_store, _world

LINGER_SECONDS = 15.0
"""How long ranks may outlive the first that failed."""


class RankServer:
    """Starts and stops the servers; use as a context manager."""

    def __init__(self, ranks: int) -> None:
        environment = {**os.environ, "NANO3_CPU": "1", "OMP_NUM_THREADS": "1"}
        self.servers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.rank_server"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
            )
            for _ in range(ranks)
        ]  # fmt: skip

    def __enter__(self) -> RankServer:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def run(self, path: Path, **environment: str) -> list[int]:
        """Runs `finetune.worker PATH` on as many ranks as it wants, of those that are here.

        Returns the exit codes by rank, minus the signal for a killed one.
        """
        run = Run.from_json(path.read_text())
        logs = Path(run.out) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        store = _rendezvous_store()
        world = _world(run.ranks, store.port)
        assert run.ranks <= len(self.servers), f"{path} wants {run.ranks} ranks, here are {len(self.servers)}"
        pids = []
        for rank, server in enumerate(self.servers[: run.ranks]):
            own = {**world, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._tell(server, {"environment": own, "path": str(path), "log": str(logs / f"rank{rank}.log")})
            pids.append(self._hear(server)["pid"])
        return self._wait(pids)

    def _wait(self, pids: list[int]) -> list[int]:
        codes: dict[int, int] = {}
        deadline = float("inf")
        while len(codes) < len(pids):
            waiting = {self.servers[rank].stdout: rank for rank in range(len(pids)) if rank not in codes}
            for stream in select.select(list(waiting), [], [], 0.1)[0]:
                rank = waiting[stream]
                codes[rank] = self._hear(self.servers[rank])["code"]
                if codes[rank] and deadline == float("inf"):
                    deadline = time.monotonic() + LINGER_SECONDS
            if time.monotonic() > deadline:
                for rank, pid in enumerate(pids):
                    if rank not in codes:
                        os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
        return [codes[rank] for rank in range(len(pids))]

    @staticmethod
    def _tell(server: subprocess.Popen[bytes], job: dict[str, Any]) -> None:
        assert server.stdin is not None
        server.stdin.write(json.dumps(job).encode() + b"\n")
        server.stdin.flush()

    @staticmethod
    def _hear(server: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert server.stdout is not None
        return json.loads(server.stdout.readline())


def run_job(job: dict[str, Any]) -> None:
    """The forked rank: the worker's main with the job's environment and log; never returns."""
    with open(job["log"], "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(job["environment"])
    sys.argv = ["finetune.worker", job["path"]]
    code = 1
    try:
        from finetune import worker
        from tests.helpers import faults

        faults.install()
        code = worker.main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from nano3 import cpu

    cpu.enable()
    import finetune.configuration  # noqa: F401  # the expensive part

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run_job(json.loads(line))
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
