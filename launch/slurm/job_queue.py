"""Jobs in Slurm's queue: handed in, looked at, followed, cancelled. Imports neither torch nor NeMo."""

from __future__ import annotations

import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from nano3.cli import UserError

POLL_SECONDS = 2.0
_LARGEST = 1000
"""Elements of an array where a site says nothing else: MaxArraySize is 1001 then, and the first index 0."""


def submit(script: str, logs: Path) -> int:
    """Hands the script to sbatch and returns the job's number; `UserError` with sbatch's words when it refuses."""
    logs.mkdir(parents=True, exist_ok=True)
    return int(_slurm(["sbatch", "--parsable"], script).split(";")[0])


def status(number: int | str) -> str:
    """State, nodes and reason of a job, or of one of an array (`12_3`), that is queued or runs; else empty."""
    try:
        return _slurm(["squeue", "--noheader", f"--jobs={number}", "--format=%i %T %M of %l on %D nodes %R"])
    except UserError as error:
        if "Invalid job id" in str(error):  # what Slurm says of a job that ended a while ago
            return ""
        raise


def queue() -> dict[int, str]:
    """State and reason of all my jobs that are queued or run, by their number; of an array, by its own number."""
    found: dict[int, dict[str, None]] = {}
    for line in _slurm(["squeue", "--me", "--noheader", "--format=%F %T %R"]).splitlines():
        number, text = line.split(maxsplit=1)
        found.setdefault(int(number), {})[text] = None
    return {number: ", ".join(texts) for number, texts in found.items()}


def largest_array() -> int:
    """Elements, counted from 1, that an array of this Slurm may have; Slurm's default where none answers."""
    with suppress(UserError):
        if said := re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm(["scontrol", "show", "config"]), re.MULTILINE):
            return int(said[1]) - 1
    return _LARGEST


def cancel(number: int) -> None:
    """Ends a job; its ranks save what the cluster's KillWait leaves them time for."""
    _slurm(["scancel", str(number)])


def follow(number: int, logs: Path) -> int:
    """Prints the logs of a job, or of all jobs of an array, as they come, until it ends; 0 if it completed, else 1.

    Raises:
        UserError: the job is not in the queue and has no log in `logs`.
    """
    tail: subprocess.Popen[bytes] | None = None
    try:
        while lives := status(number):
            if tail is None and (found := _logs_of(number, logs)):
                tail = _tail(found, "--lines=100", "--follow=name", "--retry")
            time.sleep(POLL_SECONDS)
        assert not lives
        if tail is None:
            found = _logs_of(number, logs)
            if not found:
                raise UserError(f"job {number} is not in the queue and has no log in {logs}")
            _tail(found, "--lines=100").wait()
        else:
            time.sleep(POLL_SECONDS)  # for what was written last
    finally:
        if tail is not None:
            tail.terminate()
            tail.wait()
    ended = outcome(number)
    print(f"job {number}: {ended or 'ended; Slurm has forgotten how'}")
    return int(ended not in ("COMPLETED", ""))


def outcome(number: int) -> str:
    """The state of a job, or of all jobs of an array that differ, as Slurm remembers it; empty if it does not."""
    with suppress(UserError):
        states = re.findall(r"JobState=(\w+)", _slurm(["scontrol", "show", "job", str(number)]))
        return " ".join(sorted(set(states)))
    return ""


def _logs_of(number: int, logs: Path) -> list[Path]:
    return sorted([*logs.glob(f"*-{number}.log"), *logs.glob(f"*-{number}_*.log")])


def _tail(found: list[Path], *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["tail", *options, *map(str, found)])


def _slurm(command: list[str], text: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not here: run this where Slurm is, or print the script with --dry-run"
        ) from None
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
