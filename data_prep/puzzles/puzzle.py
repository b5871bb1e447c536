"""What a puzzle is, in every kind: a question with worked examples, one answer, and the reasoning that finds it.

A kind declares a family of rules. A puzzle is kept only when every rule of the family that fits its examples gives the
same answer, so the answer follows from the question. Level 1 is the easiest, 3 the hardest; a kind may have a level 0
for very small models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ASK = "Put the final answer in \\boxed{}."
"""How every question ends; the public challenge reads the box."""
LEVELS = (1, 2, 3)
ARROW = " -> "
DRAWS = 200
"""Draws for one puzzle before its kind counts as broken: most need one or two."""

Pairs = list[tuple[str, str]]
"""(shown input, shown output) of the worked examples, in the order of the question."""


@dataclass(frozen=True)
class Puzzle:
    """One question with its answer; `tolerance` is relative, 0 where the answer must be equal letter for letter."""

    kind: str
    level: int
    question: str
    reasoning: str
    answer: str
    tolerance: float = 0.0


@dataclass(frozen=True)
class Kind:
    """One kind of puzzle: `draw` makes a candidate of a level, or None when its examples leave two answers open.

    Its levels are those from `least` to 3.
    """

    name: str
    says: str
    draw: Callable[[random.Random, int], Puzzle | None]
    least: int = LEVELS[0]


def question(rule: str, pairs: Pairs, ask: str, arrow: str = ARROW) -> str:
    """The text of a puzzle: what is known of the rule, its examples a line each, and what is asked."""
    return "\n".join([rule, *(f"{left}{arrow}{right}" for left, right in pairs), ask, ASK])


def shown(text: str, arrow: str = ARROW) -> Pairs:
    """The examples of a question, read back from its text."""
    return [(left, right) for left, found, right in (line.partition(arrow) for line in text.split("\n")) if found]


def draw(kind: Kind, seed: int, number: int, level: int) -> Puzzle:
    """Puzzle `number` of a seed, a function of its arguments alone. Raises `RuntimeError` when none can be drawn."""
    source = random.Random(f"{kind.name}:{level}:{seed}:{number}")
    for _ in range(DRAWS):
        if puzzle := kind.draw(source, level):
            return puzzle
    raise RuntimeError(f"{kind.name} at level {level} gave no puzzle with one answer in {DRAWS} draws")


def only(values: Sequence[str]) -> str | None:
    """The one value of a non-empty sequence of equal values, else None."""
    return values[0] if len(set(values)) == 1 else None
