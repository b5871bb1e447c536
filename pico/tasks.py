"""The tasks of `pico`: what it is pretrained on, and the task that the demo teaches it.

Questions and answers are drawn by reasoning-gym's generators. Their instructions run to hundreds of characters, too
long for a small model on a CPU, so each task keeps one sentence of them and writes lists as `14, 25, 49`; the rule
stands in the task's `shorten` function, and nothing else is changed. The answers are the generator's own.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.overlap import HeldOut, distinct_new
from data_prep.sources.reasoning_gym import reasoning_gym_rows
from nano3.cli import UserError
from nano3.conversations import Conversation

Shorten = Callable[[str, str], "tuple[str, str] | None"]
"""(question, answer) of reasoning-gym -> ours, or None for an item that the task leaves out."""

VIRTUAL_SIZE = 10_000_000
"""Length that generators are told to have; items are made when they are asked for."""

TRIES = 100
"""Questions drawn for each one wanted before a task counts as exhausted."""


@dataclass(frozen=True)
class Task:
    """One reasoning-gym generator with its parameters and the rule that shortens its questions."""

    name: str
    generator: str
    shorten: Shorten
    parameters: Mapping[str, Any] = field(default_factory=dict)


def _listed(answer: str) -> str:
    """`"['14.0', '25.0']"` -> `14, 25`."""
    return ", ".join(number.removesuffix(".0") for number in ast.literal_eval(answer))


def _sorting(direction: str) -> Shorten:
    """First line only, in one of the two directions, integers without the `.0` that the generator gives them."""

    def shorten(question: str, answer: str) -> tuple[str, str] | None:
        line = question.splitlines()[0]
        return (re.sub(r"\.0\b", "", line), _listed(answer)) if direction in line else None

    return shorten


def _filtering(question: str, answer: str) -> tuple[str, str] | None:
    """First line only, the list without quotes and brackets; items whose answer is empty are left out."""
    line = question.splitlines()[0]
    return (re.sub(r"['\[\]]", "", line), _listed(answer)) if answer != "[]" else None


def _spelling(question: str, answer: str) -> tuple[str, str]:
    """Without the example in parentheses."""
    return re.sub(r" \(example:.*?\)", "", question), answer


def _reversal(question: str, answer: str) -> tuple[str, str]:
    """Last line only: `Reverse this list of words: ...`."""
    return question.strip().splitlines()[-1], answer


def _word_sorting(question: str, answer: str) -> tuple[str, str]:
    """Last line only: `Sort these words in ascending|descending order: ...`."""
    line = question.strip().splitlines()[-1]
    direction, words = re.fullmatch(r"Now, sort these words in (\w+) order .*? list: (.*)", line).groups()  # type: ignore[union-attr]
    return f"Sort these words in {direction} order: {words}", answer


def _as_given(question: str, answer: str) -> tuple[str, str]:
    return question, answer


def numbers(least: int, most: int) -> dict[str, int]:
    """A generator's parameters for lists of so many whole numbers below 100."""
    return {
        "min_numbers": least,
        "max_numbers": most,
        "min_decimals": 0,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 99,
    }


PRETRAINING = {
    task.name: (task, share)
    for task, share in (
        (Task("sort_ascending", "number_sorting", _sorting("ascending"), numbers(3, 5)), 0.4),
        (Task("filter_numbers", "number_filtering", _filtering, numbers(3, 5)), 0.2),
        (Task("spell_backward", "spell_backward", _spelling, {"min_word_len": 3, "max_word_len": 6}), 0.15),
        (Task("reverse_words", "word_sequence_reversal", _reversal, {"min_words": 2, "max_words": 4}), 0.1),
        (
            Task(
                "sort_words",
                "word_sorting",
                _word_sorting,
                {"min_words": 2, "max_words": 3, "min_word_length": 3, "max_word_length": 6},
            ),
            0.1,
        ),
        (Task("count_letters", "letter_counting", _as_given, {"min_words": 2, "max_words": 4}), 0.05),
    )
}
"""Task name -> (task, its share of the pretraining examples)."""

DEMO = Task("sort_8_to_10", "number_sorting", _sorting("ascending"), numbers(8, 10))
"""What the demo teaches. Pretraining sorted at most 5 numbers: the instruction is known to pico, the ability is not."""


def endless_rows(task: Task, seed: int) -> Iterator[dict[str, Any]]:
    """Chat rows {id, source, messages} of a task, always the same for the same seed; questions may repeat."""
    for row in reasoning_gym_rows(task.generator, VIRTUAL_SIZE, seed, **task.parameters):
        question, answer = (message["content"] for message in row["messages"])
        pair = task.shorten(question, answer)
        if pair is not None:
            messages = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
            yield {**row, "messages": messages}


def rows(task: Task, count: int, seed: int, held_out: HeldOut | None = None) -> list[dict[str, Any]]:
    """`count` rows of a task, no question twice and none that is or nearly is one of `held_out`.

    Raises `UserError` when the task runs out of such questions.
    """
    found = list(distinct_new(itertools.islice(endless_rows(task, seed), TRIES * count), count, held_out))
    if len(found) < count:
        raise UserError(f"task {task.name} has only {len(found)} of {count} new questions; ask for fewer")
    return found


def conversations(rows: list[dict[str, Any]]) -> list[Conversation]:
    """Rows in the form that `HeldOut` compares."""
    return [Conversation(row["id"], row["source"], row["messages"], row["id"]) for row in rows]
