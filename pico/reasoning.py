"""Two tasks of reasoning-gym with a chain of thought for each answer, for recipes/reasoning_lora.py.

Pretraining knows both instructions with at most 5 numbers, and no reasoning. The chains are written here by rule, from
the question and the generator's own answer, so that each step of a chain is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from data_prep.overlap import HeldOut
from pico.tasks import DEMO, PRETRAINING, Task, numbers, rows

FILTERING = Task(
    "filter_7_to_9", "number_filtering", PRETRAINING["filter_numbers"][0].shorten, numbers(7, 9)
)  # pretraining filtered at most 5


def sorting_chain(question: str, answer: str) -> str:
    """Numbers by their tens, in each group as they were given: `0: 2; 10: 14, 10; 90: 98`."""
    given = [int(number) for number in _listed(question)]
    groups = groupby(sorted(int(number) for number in answer.split(", ")), lambda number: number // 10)
    return "; ".join(f"{10 * tens}: {_tens(given, tens)}" for tens, _ in groups)


def filtering_chain(question: str, answer: str) -> str:
    """Every number of the list with its verdict: `53 yes, 19 no`."""
    kept = set(answer.split(", "))
    return ", ".join(f"{number} {'yes' if number in kept else 'no'}" for number in _listed(question))


def _listed(question: str) -> list[str]:
    """The numbers behind the question's colon, as they are written."""
    return re.findall(r"\d+", question.partition(":")[2])


def _tens(given: list[int], tens: int) -> str:
    return ", ".join(str(number) for number in given if number // 10 == tens)


TASKS: dict[str, tuple[Task, Callable[[str, str], str]]] = {
    "sort": (DEMO, sorting_chain),
    "filter": (FILTERING, filtering_chain),
}
"""Name -> (task, its chain of thought from question and answer)."""


def reasoned_rows(name: str, count: int, seed: int, held_out: HeldOut | None = None) -> Iterator[dict[str, Any]]:
    """`count` chat rows of one of `TASKS`, the chain as the answer's `reasoning_content`; see `pico.tasks.rows`."""
    task, chain = TASKS[name]
    for row in rows(task, count, seed, held_out):
        asked, said = row["messages"]
        reasoning = chain(asked["content"], said["content"])
        yield {**row, "source": task.name, "messages": [asked, {**said, "reasoning_content": reasoning}]}
