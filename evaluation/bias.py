"""Letter and position bias: whether a model likes B, or whatever stands first, more than the right answer.

Every question is asked again with its options moved round and, apart from that, with its letters moved round: 2k times
for k options. Then every option stands as often at each place and under each letter. Without bias picks are spread
evenly over both, and the same option is picked each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluation.judging.questions import Question
from evaluation.models import Model
from nano3.cli import UserError
from nano3.row_keys import LETTERS


@dataclass(frozen=True)
class Turned:
    """A question with its options moved by `shift` places and its letters by `relabel`: option o stands at place
    (o + shift) mod k, under letter (place + relabel) mod k."""

    original: Question
    shift: int
    relabel: int

    @property
    def count(self) -> int:
        return len(self.original.choices)

    def place(self, letter: int) -> int:
        """Where the option under a letter (by number) stands."""
        return (letter - self.relabel) % self.count

    def option(self, letter: int) -> int:
        """Which option of the original stands under a letter."""
        return (self.place(letter) - self.shift) % self.count

    def question(self) -> Question:
        """As it is asked. Raises `UserError` where the options are not found in the text."""
        *before, last = self.original.messages
        choices, count = self.original.choices, self.count
        listed = "\n".join(f"{LETTERS[n]}. {choice.strip()}" for n, choice in enumerate(choices))
        head, found, tail = str(last["content"]).rpartition(listed)
        if not found:
            raise UserError(
                f"question {self.original.id}: its options are not lines 'A. ...' of the text; leave out --bias"
            )
        under = [(place + self.relabel) % count for place in range(count)]
        lines = [f"{LETTERS[letter]}. {choices[self.option(letter)].strip()}" for letter in under]
        text = head + "\n".join(lines) + tail
        by_letter = tuple(choices[self.option(letter)] for letter in range(count))
        right = next(n for n in range(count) if LETTERS[self.option(n)] == self.original.answer)
        messages = (*before, {**last, "content": text})
        return replace(self.original, messages=messages, choices=by_letter, answer=LETTERS[right])


def turns_of(questions: Sequence[Question]) -> list[tuple[Turned, Question]]:
    """Every turn of every question, and how it is asked.

    Raises `UserError` for questions with different numbers of options, whose shares would not add up, and for options
    that do not stand in the text as lines of their own.
    """
    counts = {len(question.choices) for question in questions}
    if len(counts) != 1 or counts == {0}:
        raise UserError(f"the questions have {sorted(counts)} options; give questions with equally many, or no --bias")
    [count] = counts
    turns = [Turned(q, shift, relabel) for q in questions for relabel in (0, 1) for shift in range(count)]
    return [(turn, turn.question()) for turn in turns]


def bias(model: Model, questions: Sequence[Question]) -> dict[str, Any]:
    """Shares of picks by letter and by place, the accuracy over all turns, and the share of steady questions.

    `largest_letter` and `largest_place` are how far the most liked one is above an even share. Raises `UserError` as
    `turns_of` does.
    """
    asked = turns_of(questions)
    turns, count = [turn for turn, _ in asked], asked[0][0].count
    scores = model.letters([question for _, question in asked])
    picks = [max(range(count), key=one.__getitem__) for one in scores]
    letters, places = Counter(picks), Counter(turn.place(pick) for turn, pick in zip(turns, picks, strict=True))
    chosen: dict[str, list[int]] = {}
    for turn, pick in zip(turns, picks, strict=True):
        chosen.setdefault(turn.original.id, []).append(turn.option(pick))
    right = sum(LETTERS[t.option(pick)] == t.original.answer for t, pick in zip(turns, picks, strict=True))
    total, even = len(turns), 1 / count
    return {
        "by_letter": {LETTERS[n]: letters[n] / total for n in range(count)},
        "by_place": {str(n + 1): places[n] / total for n in range(count)},
        "largest_letter": max(letters.values()) / total - even,
        "largest_place": max(places.values()) / total - even,
        "accuracy": right / total,
        "steady": sum(len(set(options)) == 1 for options in chosen.values()) / len(chosen),
    }
