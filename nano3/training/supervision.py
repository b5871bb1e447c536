"""Ends a run whose ranks no longer answer or no longer get on, names the rank, and names ranks that are slower.

Every rank has a thread. It writes a beat into the launcher's store: how often it has beaten, and where the rank is. It
watches the beat of the rank before it, and rank 0 watches the last. So each rank is watched by one other, a run of any
size costs each rank a few small messages a beat, and a rank that is stopped is noticed by one that is not. Who notices
writes the verdict into the store, where all other threads find it. Nothing here needs the ranks' own communication,
which waits for the rank that is silent.

    supervisor = start(silent_seconds=60, stuck_minutes=30, slow=1.5)    # on every rank, before NeMo is imported
    supervisor.at("step 12")                                             # the rank gets on
    supervisor.finish()                                                  # it ends by itself

Imports neither Lightning nor NeMo, and torch only to reach the store.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

VERDICT = "nano3/verdict"
"""Key in the store: why the run ends. `launch/local.py` reads it too."""
TOLD = "nano3/told"
"""Key in the store: rank 0 has said it."""
EXIT_CODE = 1
"""Of every rank of a run that was ended here: no user's mistake, so the job may be tried again."""
BEATS = 12
"""Beats in the time after which a rank counts as silent: one late beat is no alarm."""
MOST_SECONDS = 5.0
"""Between two beats, however long that time is."""
SAMPLE_SECONDS = 0.05
"""Between two looks at what the main thread does."""
FEWEST_SAMPLES = 40
"""Looks below which nobody is called slow."""
REPORT_BEATS = 6
"""Beats between two looks of rank 0 at who is slow; who is so twice in a row is named."""
WAITING = ("torch/distributed/", "pipeline_parallel/p2p_communication.py")
"""Files in whose functions a rank that waits for others is found."""


class Store:
    """What is used of torch.distributed's stores: text by key. Its calls release the interpreter's lock."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def write(self, key: str, text: str) -> None:
        """Sets the key."""
        self.store.set(key, text)

    def read(self, key: str) -> str | None:
        """The key's text, None where nobody has set it."""
        return self.store.get(key).decode() if self.store.check([key]) else None


def connect() -> Store:
    """A connection of its own to the launcher's store: the main thread may hold torch's while it waits."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return Store(TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)))


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    count: int
    """Of its beats; -1: it has ended by itself."""
    marks: int
    """How often it has got on."""
    place: str
    """Where it is: `step 12`."""
    host: str
    pid: int
    began: str
    """When the process started, as /proc/PID/stat has it: with the number it names one process."""
    peers: str
    """Ranks with the same do equal work: those of one pipeline stage."""
    work: float
    """Seconds of a step in which it did not wait for others; 0: not known yet."""

    def dump(self) -> str:
        """As text for the store."""
        return json.dumps(vars(self))

    @classmethod
    def load(cls, text: str | None) -> Beat | None:
        """The inverse; None stays None."""
        return None if text is None else cls(**json.loads(text))


def process_began(pid: int) -> str:
    """Field 22 of /proc/PID/stat (proc(5)); empty when there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


class Work:
    """How a rank's main thread spends its steps: at its own work, or waiting for other ranks.

    Looked at every `SAMPLE_SECONDS` of a step: the function that it is in decides. What lies between steps, a
    validation or a checkpoint, is no step's work. True on CPU ranks, whose collectives block in torch.distributed; on
    a GPU they do not, and kernels' times are what tells (docs/launch.md).
    """

    def __init__(self, main_thread: int) -> None:
        self.main_thread = main_thread
        self.looks = self.waits = self.steps = 0
        self.spent = self.seconds = 0.0
        self.began: float | None = None
        """When the step began; None between steps."""

    def look(self) -> None:
        """Notes what the main thread does at this moment of a step."""
        if self.began is None:
            return
        frame = sys._current_frames().get(self.main_thread)
        self.looks += 1
        self.waits += frame is not None and any(part in frame.f_code.co_filename for part in WAITING)

    def begin(self) -> None:
        """A step begins."""
        self.began = time.monotonic()

    def end(self) -> None:
        """The step has ended."""
        if self.began is None:
            return
        self.spent += time.monotonic() - self.began
        self.steps += 1
        self.began = None
        if self.looks < FEWEST_SAMPLES:
            return
        self.seconds = self.spent / self.steps * (1 - self.waits / self.looks)
        self.looks = self.waits = self.steps = 0
        self.spent = 0.0


class Supervisor:
    """One rank's thread. `start` makes and starts it.

    Args:
        rank, ranks: of the run.
        silent_seconds: without a beat after which a rank counts as stopped.
        stuck_minutes: in which a rank must get on (a step, a pack of a validation, a checkpoint).
        slow: a rank that works so many times as long as the others is named; 0: none.
        reach: connects to the store; called in the thread.
        end: what ends this process; never returns.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        silent_seconds: float,
        stuck_minutes: float,
        slow: float,
        reach: Callable[[], Store] = connect,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.rank, self.ranks, self.end = rank, ranks, end
        self.silent, self.stuck, self.slow = silent_seconds, 60 * stuck_minutes, slow
        self.interval = min(MOST_SECONDS, silent_seconds / BEATS)
        self.reach = reach
        self.count = self.marks = 0
        self.place, self.peers = "starting", ""
        self.work = Work(threading.main_thread().ident or 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervision", daemon=True)
        self._before: tuple[int, float] = (-1, time.monotonic())
        self._marked: tuple[int, float] = (0, time.monotonic())
        self._slow: set[int] = set()
        self._named: set[int] = set()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def at(self, place: str) -> None:
        """The rank has got on, and is there now."""
        self.place = place
        self.marks += 1

    def finish(self) -> None:
        """The rank ends by itself, well or not: nobody misses it."""
        self._stop.set()
        self._thread.join(timeout=2 * self.interval + 1)

    def beats(self, store: Store) -> dict[int, Beat]:
        """The last beat of every rank that has beaten."""
        found = {rank: Beat.load(store.read(self._key(rank))) for rank in range(self.ranks)}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    @staticmethod
    def _key(rank: int) -> str:
        return f"nano3/beat/{rank}"

    def _run(self) -> None:
        """The thread: a beat every interval, and looks in between, until the rank ends. A store that is gone ends the
        rank: so is the launcher, and nobody would wait for it."""
        try:
            store = self.reach()
            last = time.monotonic() - self.interval
            while not self._stop.wait(SAMPLE_SECONDS):
                self.work.look()
                now = time.monotonic()
                if now - last < self.interval:
                    continue
                if now - last > self.silent / 2:  # we were stopped ourselves: what we know of others is old
                    self._before, self._marked = (-1, now), (self.marks, now)
                last = now
                self._beat(store, now)
            self.count = -2
            self._write(store)
        except Exception as error:
            if not self._stop.is_set():
                self._leave(f"the launcher of rank {self.rank} is gone ({type(error).__name__})", tell=True)

    def _write(self, store: Store) -> None:
        self.count += 1
        pid = os.getpid()
        beat = Beat(
            self.count, self.marks, self.place, socket.gethostname(), pid, process_began(pid), self.peers,
            self.work.seconds,
        )  # fmt: skip
        store.write(self._key(self.rank), beat.dump())

    def _beat(self, store: Store, now: float) -> None:
        """Says that this rank lives, and looks at the verdict, at the rank before it and at its own progress."""
        self._write(store)
        if (verdict := store.read(VERDICT)) is not None:
            self._obey(verdict)
            return
        other = Beat.load(store.read(self._key((self.rank - 1) % self.ranks)))
        if other is not None and other.count != self._before[0]:
            self._before = (other.count, now)
        elif other is not None and other.count >= 0 and now - self._before[1] > self.silent:
            self._accuse_silent(store)
        if self.marks != self._marked[0]:
            self._marked = (self.marks, now)
        elif now - self._marked[1] > self.stuck:
            self._accuse_stuck(store)
        if self.rank == 0 and self.slow and self.count % REPORT_BEATS == 0:
            self._name_slow(store)

    def _name_slow(self, store: Store) -> None:
        """Prints a line for each rank that was slow at the last look too, and was not at the one before it."""
        beats = self.beats(store)
        slow = {rank: (own, others) for rank, own, others in slow_ranks(beats, self.slow)}
        for rank in sorted(slow.keys() & self._slow - self._named):
            own, others = slow[rank]
            print(
                f"note: rank {rank} (process {beats[rank].pid} on {beats[rank].host}) is slow: {own:.2f} s of a step "
                f"are its own work, {others:.2f} s in the middle of the others; all wait for it",
                flush=True,
            )
        self._named = slow.keys() & (self._slow | self._named)
        self._slow = set(slow)

    def _accuse_silent(self, store: Store) -> None:
        """Names every rank whose beat has not changed for as long as three more should have come."""
        first = self.beats(store)
        if self._stop.wait(3 * self.interval):
            return
        second = self.beats(store)
        silent = [rank for rank, beat in second.items() if 0 <= beat.count == first[rank].count and rank != self.rank]
        if (self.rank - 1) % self.ranks not in silent:
            return  # it is back
        named = "; ".join(
            f"rank {rank} (process {second[rank].pid} on {second[rank].host}, in {second[rank].place})"
            for rank in silent
        )
        text = f"no answer for {self.silent:g} s from {named}: stopped, or its machine stands still"
        self._decide(store, text, silent)

    def _accuse_stuck(self, store: Store) -> None:
        """Names the ranks that are behind; where none is, all wait for what never comes."""
        beats = {rank: beat for rank, beat in self.beats(store).items() if beat.count >= 0}
        least = min(beat.marks for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.marks == least]
        who = "all ranks are" if len(behind) == len(beats) else f"behind are ranks {', '.join(map(str, behind))},"
        text = f"rank {self.rank} did not get on for {self.stuck / 60:g} minutes; {who} in {beats[behind[0]].place}"
        self._decide(store, text, [])

    def _decide(self, store: Store, text: str, silent: list[int]) -> None:
        verdict = json.dumps({"text": text, "silent": silent, "by": self.rank})
        store.write(VERDICT, verdict)
        self._obey(verdict)

    def _obey(self, verdict: str) -> None:
        """Ends this rank, and the silent ones of this machine, which end no other way.

        Rank 0 says why for all; where it is the silent one, the rank that noticed. The others wait for that: once one
        of them is gone, those that wait for it in a collective fail with words of their own.
        """
        facts = json.loads(verdict)
        store = self.reach()
        tell = self.rank == (facts["by"] if 0 in facts["silent"] else 0)
        if tell and self.rank == 0:
            store.write(TOLD, "")
        if not tell:
            self._stop.wait(2 * self.interval)
        for rank in facts["silent"]:
            beat = Beat.load(store.read(self._key(rank)))
            if beat and beat.host == socket.gethostname() and beat.began == process_began(beat.pid) != "":
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)
        if tell or not self._stop.is_set():  # set: it has ended by itself meanwhile
            self._leave(facts["text"], tell)

    def _leave(self, text: str, tell: bool) -> None:
        if tell:
            print(f"error: {text}. All ranks end; the same command resumes the run", file=sys.stderr)
        frame = sys._current_frames().get(self.work.main_thread)
        if frame is not None and not tell:
            print(f"rank {self.rank} was here:\n{''.join(traceback.format_stack(frame)[-6:])}", file=sys.stderr)
        sys.stderr.flush()
        self.end(EXIT_CODE)


def slow_ranks(beats: dict[int, Beat], ratio: float) -> list[tuple[int, float, float]]:
    """(rank, its seconds of work a step, the others' median) of ranks that work above `ratio` times as long as the
    median of the others that do equal work, the slowest first."""
    found = []
    for rank, beat in beats.items():
        others = [b.work for r, b in beats.items() if r != rank and b.peers == beat.peers and b.work > 0]
        if others and beat.work > ratio * statistics.median(others):
            found.append((rank, beat.work, statistics.median(others)))
    return sorted(found, key=lambda item: -item[1])


_running: Supervisor | None = None


def start(silent_seconds: float, stuck_minutes: float, slow: float) -> Supervisor | None:
    """Starts this rank's thread. None without a launcher (no rank, no store), and for one rank: nobody is there to
    notice."""
    global _running
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        _running = Supervisor(int(os.environ["RANK"]), ranks, silent_seconds, stuck_minutes, slow)
        _running.start()
    return _running


def running() -> Supervisor | None:
    """This rank's thread, if it was started."""
    return _running
