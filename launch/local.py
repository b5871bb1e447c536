"""Runs a Python script on several ranks of this machine, talking over the loopback interface. No cluster needed.

    run_ranks(["recipes/nemotron_lora.py", "--model", "pico"], ranks=2, log_dir=Path("runs/demo/logs"))

Ranks see the environment that torchrun gives (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, ...). Rank 0
speaks on this process's stdout and stderr; every rank, rank 0 too, also writes `rank<N>.log`.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any

from launch.guard import end_processes
from nano3.cli import UserError
from nano3.training.supervision import TOLD, VERDICT

HOST = "127.0.0.1"
POLL_SECONDS = 0.05
BLAME_SECONDS = 1.0
"""How long after the first failure other ranks may fail by themselves, so that the culprit is listed too."""
GRACE_SECONDS = 5.0
"""Between asking ranks to end (SIGTERM) and making them (SIGKILL), after one has failed."""
FAREWELL_SECONDS = 120.0
"""The same when this process is asked to end: the ranks finish their step and write a checkpoint."""
STORE_TIMEOUT = timedelta(minutes=30)
TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Terminated(Exception):
    """SIGTERM reached this process."""


def run_ranks(argv: list[str], ranks: int, log_dir: Path, env: dict[str, str] | None = None) -> int:
    """Runs `python argv...` (a script and its arguments, or `-m module ...`) on `ranks` processes and waits for them.

    `env` is added to this process's environment. OMP_NUM_THREADS is this process's CPU cores over ranks if it is unset.
    Returns 0 when all succeed; otherwise ends the rest, prints which rank failed with the tail of its log, and returns
    its exit code (128 + N after signal N). SIGTERM asks the ranks to finish their step and save, and returns 143;
    Ctrl-C does the same and is raised on, and a second Ctrl-C ends them at once. A run that its ranks ended because one
    of them no longer answers returns 1, and the rank is named (nano3/training/supervision.py).
    Nothing that was started outlives the call, nor the death of this process, even by SIGKILL (launch/guard.py).
    """
    if ranks < 1:
        raise UserError(f"the number of ranks is {ranks}; it must be at least 1")
    log_dir.mkdir(parents=True, exist_ok=True)
    # The ranks' rendezvous store lives here and its port is the kernel's choice, held from the first moment on: a free
    # port that is looked up first and used later may be gone by then.
    store = rendezvous_store()
    world = world_of(ranks, store.port)
    shared = {**os.environ, "OMP_NUM_THREADS": _threads(ranks), **(env or {}), **world}
    guard = _start_guard(world["TORCHELASTIC_RUN_ID"])
    processes: list[subprocess.Popen[bytes]] = []
    pumps: list[threading.Thread] = []
    patience = GRACE_SECONDS
    with _termination_as_exception():
        try:
            for rank in range(ranks):
                process = _start(argv, rank, log_dir, shared)
                processes.append(process)
                if rank == 0:
                    pumps = _pump_rank_0(process, log_dir)
            failed = _wait(processes, guard)
        except _Terminated:
            print("terminated: all ranks finish their step and end", file=sys.stderr)
            patience = FAREWELL_SECONDS
            return 128 + signal.SIGTERM
        except KeyboardInterrupt:
            print(
                "\ninterrupted: all ranks finish their step, save and end; Ctrl-C again ends them now", file=sys.stderr
            )
            patience = FAREWELL_SECONDS
            raise
        finally:
            try:
                _end(processes, patience)
            finally:
                _end_guard(guard, world["TORCHELASTIC_RUN_ID"])
            for pump in pumps:
                pump.join(GRACE_SECONDS)
    if store.check([VERDICT]):
        _report_verdict(json.loads(store.get(VERDICT)), store.check([TOLD]), log_dir)
        return 1
    if failed:
        _report(processes, failed, log_dir)
        return _exit_code(processes[failed[0]])
    return 0


def run_child(command: list[str], cwd: Path) -> int:
    """Runs a program that ends when this process does, and returns its exit code as a shell reports it.

    SIGTERM is passed on; Ctrl-C reaches it from the terminal, as it does us: then it is waited for, since a training
    saves before it ends. A second Ctrl-C ends it at once.
    """
    with _termination_as_exception():
        process = subprocess.Popen(command, cwd=cwd, preexec_fn=die_with_parent)
        try:
            process.wait()
        except _Terminated:
            process.terminate()
            process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
    return _exit_code(process)


def _start_guard(run_id: str) -> subprocess.Popen[bytes]:
    """The process that ends what is left of the run when this one has ended."""
    command = [sys.executable, "-S", "-E", str(Path(__file__).parent / "guard.py"), run_id]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _end_guard(guard: subprocess.Popen[bytes], run_id: str) -> None:
    assert guard.stdin is not None
    guard.stdin.close()
    if guard.wait():  # it was killed itself
        end_processes(run_id)


def log_file(log_dir: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return log_dir / f"rank{rank}.log"


def rendezvous_store() -> Any:
    """A store that listens on the loopback interface only (by itself it would listen on all of them)."""
    from torch.distributed import TCPStore

    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        HOST, port, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT, master_listen_fd=listener.detach()
    )


def world_of(ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells every rank; the TORCHELASTIC names make `env://` join our store instead of opening one."""
    return {
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": f"local-{os.getpid()}-{port}",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "PYTHONUNBUFFERED": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # gloo would ask what the host's name resolves to, which may be nothing
    }


def _threads(ranks: int) -> str:
    """OMP_NUM_THREADS per rank: what the user set, or an equal share of the cores that this process may use."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // ranks))


def _start(argv: list[str], rank: int, log_dir: Path, shared: dict[str, str]) -> subprocess.Popen[bytes]:
    """One rank, leader of its own session: signals reach its children too, and a terminal's Ctrl-C reaches only us."""
    env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    command = [sys.executable, *argv]
    if rank == 0:
        return subprocess.Popen(
            command, env=env, start_new_session=True, preexec_fn=die_with_parent,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    with log_file(log_dir, rank).open("wb") as log:
        return subprocess.Popen(
            command, env=env, start_new_session=True, preexec_fn=die_with_parent,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when the one that started it dies, even by SIGKILL (Linux: prctl(2))."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _pump_rank_0(process: subprocess.Popen[bytes], log_dir: Path) -> list[threading.Thread]:
    """Threads that copy rank 0's output as it comes, progress bars included, to ours and to its log."""
    log = log_file(log_dir, 0)
    log.write_bytes(b"")
    threads = []
    for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        assert source is not None
        threads.append(threading.Thread(target=_pump, args=(source, sink, log), daemon=True))
        threads[-1].start()
    return threads


def _pump(source: IO[bytes], sink: IO[str], log: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with source, log.open("ab", buffering=0) as copy:
        while chunk := os.read(source.fileno(), 1 << 16):
            copy.write(chunk)
            sink.write(decoder.decode(chunk))
            sink.flush()


def _wait(processes: list[subprocess.Popen[bytes]], guard: subprocess.Popen[bytes]) -> list[int]:
    """Waits until all ranks ended or one failed; the failed ranks, the one that was seen to fail first in front.

    Of those that are seen at once a killed one goes first: the others fail because it no longer answers.

    Raises:
        ChildProcessError: somebody ended the guard, without which nobody would end the ranks.
    """
    failed: list[int] = []
    deadline = float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        new = [rank for rank, code in enumerate(codes) if code and rank not in failed]
        failed += sorted(new, key=lambda rank: processes[rank].returncode > 0)
        if all(code is not None for code in codes):
            break
        if guard.poll() is not None:
            raise ChildProcessError(f"launch/guard.py, which watches over this run, was ended (process {guard.pid})")
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + BLAME_SECONDS
        time.sleep(POLL_SECONDS)
    return failed


def _end(processes: list[subprocess.Popen[bytes]], patience: float) -> None:
    """Ends every rank and whatever it started: asked first, killed after `patience` seconds or at Ctrl-C."""
    running = [process for process in processes if process.poll() is None]
    try:
        for process in running:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, number)


def _report(processes: list[subprocess.Popen[bytes]], failed: list[int], log_dir: Path) -> None:
    """Names the ranks that failed, with the end of their logs; rank 0's words were seen already.

    A user's mistake (exit code 2, see nano3.cli) is the same on every rank: rank 0's one line says it all.
    """
    if 0 in failed and _exit_code(processes[0]) == 2:
        return
    for rank in failed:
        log = log_file(log_dir, rank)
        how = f"failed with exit code {_exit_code(processes[rank])}{_signal_in_words(processes[rank])}"
        print(f"rank {rank} {how}; its log: {log}", file=sys.stderr)
        if rank:
            lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print("\n".join(f"  [rank {rank}] {line}" for line in lines), file=sys.stderr)


def _report_verdict(verdict: dict[str, Any], told: bool, log_dir: Path) -> None:
    """Why the ranks ended the run, unless rank 0 has said it here."""
    if not told:
        print(f"error: {verdict['text']}. All ranks end; the same command resumes the run", file=sys.stderr)
    print(f"what each rank was doing stands at the end of its log in {log_dir}", file=sys.stderr)


def _signal_in_words(process: subprocess.Popen[bytes]) -> str:
    """What ended a process that did not end by itself; empty for one that did."""
    if process.returncode >= 0:
        return ""
    name = signal.Signals(-process.returncode).name
    why = ", by hand or by the kernel when memory ran out: dmesg says" if name == "SIGKILL" else ""
    return f" (killed by {name}{why})"


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """As a shell reports it: 128 + N for a process that signal N ended."""
    code = process.returncode
    return 128 - code if code < 0 else code


@contextmanager
def _termination_as_exception() -> Iterator[None]:
    """While the ranks run, SIGTERM raises `_Terminated` here, so that the same cleaning-up runs as for an error."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only a main thread may set handlers; whoever runs it owns the signals
        return

    def raise_terminated(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
