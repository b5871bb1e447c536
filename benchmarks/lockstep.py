"""Two or more training loops that take turns: each in a process of its own, only one of them running at a time.

The driver says "step" to a worker and waits for its answer before it turns to the next. A process of its own for each,
because the CPU stand-ins replace parts of torch, which the reference must not see. Imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nano3.cli import UserError

HERE = Path(__file__).parent
START_SECONDS = 600.0
"""How long a worker may take to import its libraries and build its model."""


@dataclass
class Job:
    """What every worker is told."""

    model: str
    """Hugging Face folder."""
    base: str
    """The same weights as a NeMo checkpoint."""
    data: str
    """Token store whose packs of `seq_length` hold one document each."""
    out: str
    """Folder that the worker may write into."""
    seq_length: int
    """Positions in a step."""
    rank: int
    alpha: float
    experts: str
    """lora.experts of the recipe."""
    steps: int
    """Steps that will be asked for."""
    seed: int = 1234


@dataclass
class Step:
    """One training step: forward, backward, clipping, optimizer."""

    wall: float
    """Seconds on the clock."""
    cpu: float
    """Seconds of this process's CPU time."""
    loss: float
    """Mean per supervised token."""


class Worker:
    """The driver's end of one training loop; a context that ends the process."""

    def __init__(self, script: str, job: Job) -> None:
        self.name = Path(script).stem
        ours, theirs = os.pipe(), os.pipe()
        self._commands = Connection(ours[1], readable=False)
        self._answers = Connection(theirs[0], writable=False)
        self.log = Path(job.out) / f"{self.name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        arguments = [str(HERE / script), str(ours[0]), str(theirs[1]), json.dumps(asdict(job))]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                pass_fds=(ours[0], theirs[1]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        os.close(ours[0])
        os.close(theirs[1])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self._commands.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ready(self) -> dict[str, Any]:
        """Waits until the model is built; the worker's facts about itself."""
        return self._answer(START_SECONDS)

    def step(self) -> Step:
        """Has the worker make one step, and waits for it."""
        self._commands.send("step")
        return Step(**self._answer(START_SECONDS))

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            if self._answers.poll(seconds):
                return self._answers.recv()
        except EOFError:
            pass
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise UserError(f"{self.name} gave no answer; the end of its log:\n{tail}")


class Server:
    """The worker's end."""

    def __init__(self) -> None:
        commands, answers, job = sys.argv[1:]
        self._commands = Connection(int(commands), writable=False)
        self._answers = Connection(int(answers), readable=False)
        self.job = Job(**json.loads(job))
        self._started = (0.0, 0.0)

    def ready(self, **facts: Any) -> None:
        """Says that the model is built."""
        self._answers.send(facts)

    def wait(self) -> bool:
        """Waits for the next "step" and starts the clock; False when the driver is gone."""
        try:
            self._commands.recv()
        except EOFError:
            return False
        self._started = (time.perf_counter(), time.process_time())
        return True

    def done(self, loss: float) -> None:
        """Stops the clock."""
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        self._answers.send(asdict(Step(wall, cpu, loss)))

    def serve(self, step: Callable[[int], float]) -> None:
        """Makes steps, numbered from 0, until the driver is gone; `step` returns the loss."""
        number = 0
        while self.wait():
            self.done(step(number))
            number += 1
