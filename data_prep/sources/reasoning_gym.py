"""reasoning-gym's procedural tasks: questions with answers that its own `score_answer` can judge.

Package reasoning-gym 0.1.25 (Stojanovski et al., 2025), Apache-2.0: 106 tasks, each item a dict of `question`,
`answer` and `metadata`. Five tasks publish no answer, since many would be right: boxnet, graph_color,
propositional_logic, rubiks_cube, rush_hour; they can be evaluated with `score_answer`, and nothing can be trained on.
time_intervals counts from today's date, and is wrong where midnight falls between two questions to the clock; here
every day is `TODAY`. evaluation/tasks/reasoning_gym.py asks `score_answer` about the same items.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from nano3.cli import UserError

TODAY = datetime.date(2026, 1, 1)
"""The day on which questions are asked that speak of today."""


def reasoning_gym_rows(task: str, size: int, seed: int, **params: Any) -> Iterator[dict[str, Any]]:
    """`size` questions with answers of a reasoning-gym task as chat rows; see `items`."""
    for number, item in enumerate(items(task, size, seed, **params)):
        if item["answer"] is None:
            raise UserError(
                f"task {task} publishes no answer, since many would be right; train on another task, and evaluate this "
                "one with reasoning-gym's own score_answer"
            )
        yield {
            "id": f"{task}-{seed}-{number}",
            "source": f"reasoning-gym/{task}",
            "messages": [
                {"role": "user", "content": str(item["question"]).strip()},
                {"role": "assistant", "content": str(item["answer"])},
            ],
        }


def items(task: str, size: int, seed: int, **params: Any) -> Iterator[dict[str, Any]]:
    """`size` items of a reasoning-gym task, the same for the same arguments.

    `params` are fields of the task's configuration. reasoning-gym makes item i of seed s from s + i, so that its
    seeds 1 and 2 share all items but one: the seed given here is hashed with the task's name first.
    """
    dataset = _reasoning_gym(task, size, int(hashlib.sha256(f"{task}:{seed}".encode()).hexdigest()[:7], 16), params)
    for number in range(size):
        with fixed_day():
            item = dataset[number]
        yield item


class _FixedDate(datetime.date):
    """Dates of which today is always `TODAY`."""

    @classmethod
    def today(cls) -> _FixedDate:
        return cls(TODAY.year, TODAY.month, TODAY.day)


@contextmanager
def fixed_day() -> Iterator[None]:
    """While it lasts, the one generator that asks for today's date gets `TODAY`; so does the parser of its times."""
    from dateutil import parser
    from reasoning_gym.arithmetic import time_intervals

    def parse(text: str, **options: Any) -> datetime.datetime:
        return parser.parse(text, default=datetime.datetime.combine(TODAY, datetime.time()), **options)

    before = time_intervals.date, time_intervals.parser
    time_intervals.date, time_intervals.parser = _FixedDate, SimpleNamespace(parse=parse)
    try:
        yield
    finally:
        time_intervals.date, time_intervals.parser = before


def check_task(task: str) -> None:
    """Raises `UserError` for a name that reasoning-gym does not have, with the nearest that it has."""
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"reasoning-gym has no task {task!r}{_nearest(task, DATASETS)}")


def _reasoning_gym(task: str, size: int, seed: int, params: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    check_task(task)
    known = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    for key in params:
        if key not in known:
            raise UserError(f"task {task} has no parameter {key!r}{_nearest(key, known)}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **params)
    except (AssertionError, TypeError, ValueError) as error:
        given = " ".join(f"{key}={value}" for key, value in params.items())
        raise UserError(f"task {task} does not take size={size} {given}: {error or 'out of range'}") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
