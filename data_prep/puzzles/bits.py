"""Bit manipulation: a hidden rule on 8-bit words, built from rotations, shifts and gates.

The family: a word moved (22 ways, and the complement of each); AND, OR or XOR of two of those; majority or choice of
three moved words without complements. That is 15,070 rules, kept as one table of their outputs for all 256 words.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from data_prep.puzzles.puzzle import Puzzle, question

KIND = "bits"
RULE = "A machine turns every 8-bit word into another by one fixed rule of shifts, rotations and logic gates."
EXAMPLES = {1: 6, 2: 9, 3: 11}
"""Worked examples of a puzzle by level."""
WORD = 8


@dataclass(frozen=True)
class Rule:
    """A rule: the gate, and the names of the moved words that it takes."""

    gate: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return self.parts[0] if self.gate == "same" else f"{self.gate}({', '.join(self.parts)})"


@cache
def _moved() -> dict[str, np.ndarray]:
    """Name -> that move of all 256 words, (256,) uint8. `rotl3` rotates left by 3, `shr2` shifts right by 2."""
    words = np.arange(256, dtype=np.uint16)
    table: dict[str, np.ndarray] = {"x": words}
    for k in range(1, WORD):
        table[f"rotl{k}"] = (words << k | words >> (WORD - k)) & 255
        table[f"shl{k}"] = words << k & 255
        table[f"shr{k}"] = words >> k
    plain = {name: values.astype(np.uint8) for name, values in table.items()}
    return plain | {f"not {name}": ~values for name, values in plain.items()}


GATES: dict[str, Callable[..., np.ndarray]] = {
    "same": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "majority": lambda a, b, c: a & b | a & c | b & c,
    "choice": lambda a, b, c: a & b | ~a & c,
}
"""Gate -> its outputs for arrays of words. `choice(a, b, c)` takes b's bit where a has a 1, else c's."""


@cache
def rules() -> tuple[list[Rule], np.ndarray]:
    """All rules, simplest first, and their outputs for all words, (15070, 256) uint8."""
    moved = _moved()
    plain = [name for name in moved if not name.startswith("not ")]
    found = [Rule("same", (name,)) for name in moved]
    found += [Rule(gate, pair) for gate in ("and", "or", "xor") for pair in itertools.combinations(moved, 2)]
    found += [Rule("majority", triple) for triple in itertools.combinations(plain, 3)]
    found += [Rule("choice", triple) for triple in itertools.product(plain, repeat=3)]
    return found, np.stack([GATES[rule.gate](*(moved[part] for part in rule.parts)) for rule in found])


@cache
def _of_level(level: int) -> list[int]:
    """The rules that a level draws from: one word moved, a gate of two, a gate of three."""
    return [i for i, rule in enumerate(rules()[0]) if len(rule.parts) == level]


def draw(source: random.Random, level: int) -> Puzzle | None:
    """A rule of the level, examples and a query; None when another rule fits the examples and answers otherwise."""
    found, table = rules()
    secret = table[source.choice(_of_level(level))]
    *inputs, query = source.sample(range(256), EXAMPLES[level] + 1)
    fitting = np.flatnonzero((table[:, inputs] == secret[inputs]).all(axis=1))
    if len(np.unique(table[fitting, query])) > 1 or len(np.unique(secret)) == 1:
        return None
    # The simplest rule that fits is what a solver finds first, whichever was drawn.
    rule = found[int(fitting[0])]
    pairs = [(_word(x), _word(int(secret[x]))) for x in inputs]
    text = question(RULE, pairs, f"What does it make of {_word(query)}?")
    return Puzzle(KIND, level, text, _reasoning(rule, inputs, query), _word(int(secret[query])))


def _reasoning(rule: Rule, inputs: list[int], query: int) -> str:
    """How the rule is found and applied: what simpler rules miss, the rule, a check of every example, the query."""
    lines = []
    if len(rule.parts) > 1:
        lines.append("No shift, rotation or complement alone fits all examples.")
    if len(rule.parts) > 2:
        lines.append("No gate of two such words fits either.")
    lines.append(f"Try {rule}.")
    lines += [f"{_word(x)}: {_steps(rule, x)}, as shown" for x in inputs]
    return "\n".join([*lines, f"All fit. {_word(query)}: {_steps(rule, query)}"])


def _steps(rule: Rule, word: int) -> str:
    """`rotl3 = 01010001, not x = 11110000, xor = 10100001`."""
    moved = _moved()
    parts = [f"{part} = {_word(int(moved[part][word]))}" for part in rule.parts]
    if rule.gate == "same":
        return parts[0]
    value = GATES[rule.gate](*(moved[part][word] for part in rule.parts))
    return ", ".join([*parts, f"{rule.gate} = {_word(int(value))}"])


def _word(value: int) -> str:
    return f"{value:0{WORD}b}"
