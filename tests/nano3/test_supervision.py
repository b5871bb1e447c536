"""Ranks that stop, do not get on or are slow: who notices, what is said, and what is left alone.

Ranks are threads here, the store a dictionary, and an end is noted instead of taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from nano3.training.supervision import EXIT_CODE, VERDICT, Beat, Store, Supervisor, Work, process_began, slow_ranks

SILENT = 1.2


class Entries:
    """What torch's store does, in a dictionary."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    def set(self, key: str, text: str) -> None:
        self.entries[key] = text.encode()

    def get(self, key: str) -> bytes:
        return self.entries[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.entries for key in keys)


class Run:
    """Supervised ranks; `ended` has the exit code of those that were ended."""

    def __init__(self) -> None:
        self.store, self.ended = Store(Entries()), dict[int, int]()
        self.ranks: list[Supervisor] = []

    def start(self, ranks: int, stuck_minutes: float = 60) -> list[Supervisor]:
        for rank in range(ranks):
            supervisor = Supervisor(rank, ranks, SILENT, stuck_minutes, 0, lambda: self.store, self._end(rank))
            self.ranks.append(supervisor)
            supervisor.start()
        return self.ranks

    def _end(self, rank: int) -> Callable[[int], None]:
        def end(code: int) -> None:
            self.ended[rank] = code
            self.ranks[rank]._stop.set()

        return end

    def wait(self, *ranks: int) -> None:
        deadline = time.monotonic() + 30
        while set(self.ended) < set(ranks):
            assert time.monotonic() < deadline, self.ended
            time.sleep(0.02)

    def silence(self, rank: int, pid: int = 1, host: str = "elsewhere") -> None:
        """The rank's thread stops as if the process had, without a word; its last beat names this process."""
        supervisor, key = self.ranks[rank], Supervisor._key(rank)
        while (beat := Beat.load(self.store.read(key))) is None:
            time.sleep(0.01)
        supervisor.count = 10**6  # what it writes while it ends is overwritten below
        supervisor._stop.set()
        supervisor._thread.join()
        self.store.write(key, replace(beat, count=7, host=host, pid=pid, began=process_began(pid)).dump())


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    for supervisor in run.ranks:
        supervisor.finish()


def test_a_rank_that_is_silent_is_named_and_ends_all_others(run, capsys):
    run.start(4)[2].at("step 12")
    run.silence(2)
    run.wait(0, 1, 3)
    assert run.ended == {0: EXIT_CODE, 1: EXIT_CODE, 3: EXIT_CODE}
    said = capsys.readouterr().err
    assert said.count("error: ") == 1  # rank 0 speaks for all
    assert "error: no answer for 1.2 s from rank 2 (process 1 on elsewhere, in " in said
    assert "the same command resumes the run" in said


def test_where_rank_0_is_silent_the_rank_that_noticed_speaks(run, capsys):
    run.start(3)
    run.silence(0)
    run.wait(1, 2)
    assert "from rank 0 (process 1" in capsys.readouterr().err
    assert json.loads(run.store.read(VERDICT) or "")["by"] == 1


def test_two_ranks_that_stop_together_are_both_named(run, capsys):
    run.start(4)
    run.silence(1)
    run.silence(2)
    run.wait(0, 3)
    said = capsys.readouterr().err
    assert "rank 1 (" in said
    assert "rank 2 (" in said


def test_a_stopped_process_of_this_machine_is_killed_and_a_number_that_was_given_again_is_not(run):
    import socket

    stopped, other = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    try:
        run.start(3)
        run.silence(1, stopped.pid, socket.gethostname())
        run.silence(2, other.pid, socket.gethostname())
        beat = Beat.load(run.store.read(Supervisor._key(2)))
        assert beat is not None
        run.store.write(Supervisor._key(2), replace(beat, began="1").dump())
        run.wait(0)
        assert stopped.wait(10) == -9
        assert other.poll() is None
    finally:
        for process in (stopped, other):
            process.kill()
            process.wait()


def test_ranks_that_answer_and_those_that_have_ended_are_left_alone(run):
    ranks = run.start(3)
    ranks[1].finish()
    time.sleep(2 * SILENT)
    assert run.ended == {}
    assert json.loads(run.store.read("nano3/beat/1") or "")["count"] == -1


def test_who_was_stopped_itself_forgets_what_it_knew(run, monkeypatch):
    """A laptop that slept, or Ctrl-Z: the clock has jumped, and nobody was silent."""
    run.start(2)
    time.sleep(SILENT / 2)
    clock = time.monotonic
    monkeypatch.setattr("nano3.training.supervision.time.monotonic", lambda: clock() + 3600)
    time.sleep(SILENT / 2)
    assert run.ended == {}


def test_ranks_that_do_not_get_on_are_named_by_where_they_are(run, capsys):
    ranks = run.start(2, stuck_minutes=SILENT / 60)
    ranks[0].at("step 3")
    ranks[0].at("step 4")
    ranks[1].at("step 3")
    run.wait(0, 1)
    said = capsys.readouterr().err
    assert "did not get on for 0.02 minutes; behind are ranks 1, in step 3" in said


def test_a_store_that_is_gone_ends_the_rank(run, capsys):
    class Gone:
        def set(self, *_: object) -> None:
            raise ConnectionResetError

    run.store = Store(Gone())
    run.start(1)
    run.wait(0)
    assert "the launcher of rank 0 is gone (ConnectionResetError)" in capsys.readouterr().err


def beat(work: float, peers: str = "stage 0") -> Beat:
    return Beat(1, 1, "step 1", "host", 1, "1", peers, work)


@pytest.mark.parametrize(
    ("beats", "slow"),
    [
        ([beat(1.0), beat(1.1), beat(1.9), beat(0.9)], [(2, 1.9, 1.0)]),
        ([beat(1.0), beat(1.6)], [(1, 1.6, 1.0)]),
        ([beat(1.0), beat(1.4)], []),
        ([beat(1.0), beat(9.0, "stage 1")], []),  # other work, other time
        ([beat(0.0), beat(9.0)], []),  # not known yet
    ],
)
def test_a_slow_rank_is_compared_with_those_that_do_equal_work(beats, slow):
    assert slow_ranks(dict(enumerate(beats)), 1.5) == slow


def test_work_is_what_is_left_of_a_step_without_the_waiting(monkeypatch):
    work, clock = Work(0), [0.0]
    monkeypatch.setattr("nano3.training.supervision.time.monotonic", lambda: clock[0])
    work.begin()
    work.looks, work.waits, clock[0] = 100, 75, 8.0
    work.end()
    assert (work.seconds, work.looks) == (2.0, 0)  # a quarter of 8 s
    work.begin()
    work.end()
    assert work.seconds == 2.0  # too few looks to know better


def test_what_lies_between_steps_is_no_work(monkeypatch):
    """Rank 0 keeps the best adapters after a validation: that made it look as slow as a rank that is."""
    work, clock = Work(0), [100.0]
    monkeypatch.setattr("nano3.training.supervision.time.monotonic", lambda: clock[0])
    for _ in range(2):
        for _ in range(50):
            work.look()  # before the first step, and while a validation runs
        work.begin()
        for _ in range(20):
            work.look()
        clock[0] += 3.0
        work.end()
        clock[0] += 40.0
    assert (work.seconds, work.looks) == (3.0, 0)  # 6 s in two steps, 40 looks
