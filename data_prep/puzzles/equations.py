"""Equation transformation: two-digit numbers and signs that mean something else; one more line to compute.

Level 1 gives each sign one of five operations. Level 2 may also reverse the digits of the operands, of the result, or
both. Level 3 has symbols for digits, and each sign picks some of the four symbols in an order of its own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.puzzles.puzzle import Pairs, Puzzle, only, question

KIND = "equations"
RULE = {
    1: "The signs in these lines do not mean what they usually mean. Each sign always means the same.",
    3: "Each sign builds its result from the four symbols around it, always in the same way.",
}
RULE[2] = RULE[1] + " Numbers may be read backwards, before or after."
SIGNS = "+-*/^$&?"
SYMBOLS = "@#%!<>[]~|"
"""No braces: a box could not hold one of a pair."""
EQUALS = " = "
USED = {1: 2, 2: 2, 3: 2}
"""Signs of a puzzle."""
LINES = {1: 3, 2: 4, 3: 3}
"""Examples for each sign."""
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "difference": lambda a, b: abs(a - b),
    "multiply": lambda a, b: a * b,
    "join": lambda a, b: a * 100 + b,
    "join the other way": lambda a, b: b * 100 + a,
}


@dataclass(frozen=True)
class Meaning:
    """What a sign means at levels 1 and 2; `flip_in` reverses the digits of both operands, `flip_out` the result's."""

    operation: str
    flip_in: bool = False
    flip_out: bool = False

    def __str__(self) -> str:
        before = "reverse both numbers, then " if self.flip_in else ""
        return f"{before}{self.operation}{', then reverse the result' if self.flip_out else ''}"

    def result(self, left: str, right: str) -> str:
        """Of two two-digit numbers, as written."""
        a, b = (int(text[::-1] if self.flip_in else text) for text in (left, right))
        value = str(OPERATIONS[self.operation](a, b))
        return str(int(value[::-1])) if self.flip_out else value


@dataclass(frozen=True)
class Template:
    """What a sign means at level 3: which of the four symbols, from 1, make the result."""

    places: tuple[int, ...]

    def __str__(self) -> str:
        return f"symbols {', '.join(str(place) for place in self.places)}"

    def result(self, left: str, right: str) -> str:
        """Of two pairs of symbols."""
        return "".join((left + right)[place - 1] for place in self.places)


def meanings(level: int) -> Sequence[Meaning | Template]:
    """The family of a level, simplest first."""
    if level == 3:
        return [Template(p) for size in (4, 3, 2, 1) for p in itertools.permutations((1, 2, 3, 4), size)]
    flips = [(False, False)] if level == 1 else [(False, False), (True, False), (False, True), (True, True)]
    return [Meaning(name, *flip) for flip in flips for name in OPERATIONS]


def draw(source: random.Random, level: int) -> Puzzle | None:
    """Signs with meanings, examples and a line; None when another meaning fits too and answers otherwise."""
    family = meanings(level)
    secret = {sign: source.choice(family) for sign in source.sample(SIGNS, USED[level])}
    asked = source.choice(list(secret))
    lines = [(sign, *_operands(source, level)) for sign in secret for _ in range(LINES[level])]
    source.shuffle(lines)
    pairs = [(f"{left}{sign}{right}", secret[sign].result(left, right)) for sign, left, right in lines]
    left, right = _operands(source, level)
    mine = [(a, b, text) for (sign, a, b), (_, text) in zip(lines, pairs, strict=True) if sign == asked]
    fits = [m for m in family if all(m.result(a, b) == text for a, b, text in mine)]
    answer = only([m.result(left, right) for m in fits])
    if answer is None or f"{left}{asked}{right}" in dict(pairs):
        return None
    text = question(RULE[level], pairs, f"What is {left}{asked}{right}?", EQUALS)
    return Puzzle(KIND, level, text, _reasoning(pairs, asked, fits[0], left, right), answer)


def _operands(source: random.Random, level: int) -> tuple[str, str]:
    """Two two-digit numbers, or two pairs of symbols of which all four are different."""
    if level == 3:
        symbols = source.sample(SYMBOLS, 4)
        return "".join(symbols[:2]), "".join(symbols[2:])
    return str(source.randrange(10, 100)), str(source.randrange(10, 100))


def _reasoning(pairs: Pairs, asked: str, meaning: Meaning | Template, left: str, right: str) -> str:
    """Only lines with the asked sign count; the meaning that fits them all; the line."""
    mine = [(text, result) for text, result in pairs if text[2] == asked]
    lines = [f"The sign is {asked}. Its lines: " + ", ".join(f"{text}{EQUALS}{result}" for text, result in mine) + "."]
    lines.append(f"Try: {meaning}.")
    lines += [f"{text} gives {meaning.result(text[:2], text[3:])}, as shown" for text, _ in mine]
    return "\n".join([*lines, f"All fit. {left}{asked}{right} gives {meaning.result(left, right)}"])
