"""The kinds of puzzles, and puzzles as rows of chat JSONL.

The kinds are those of the public reasoning challenge on Nemotron-3-Nano; questions and solvers are our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.puzzles import bits, ciphers, equations, measures, numerals
from data_prep.puzzles.puzzle import LEVELS, Kind, Puzzle, draw
from data_prep.puzzles.second_solver import answers
from nano3.cli import UserError

KINDS = {
    kind.name: kind
    for kind in (
        Kind(bits.KIND, "bit manipulation", bits.draw),
        Kind(ciphers.KIND, "text encryption", ciphers.draw),
        Kind(numerals.KIND, "numeral systems", numerals.draw, least=0),
        Kind("units", "unit conversion with a hidden factor", measures.draw_units),
        Kind("gravity", "altered gravity", measures.draw_gravity),
        Kind(equations.KIND, "equation transformation", equations.draw),
    )
}
PREFIX = "challenge/"
"""What a kind's name follows as a row's source."""


def checked(kind: str, seed: int, number: int, level: int) -> Puzzle:
    """A puzzle on which both solvers agree. Raises `RuntimeError` where they do not: a fault of ours."""
    puzzle = draw(KINDS[kind], seed, number, level)
    found = answers(kind, puzzle.question)
    if found != {puzzle.answer}:
        raise RuntimeError(f"{kind} {seed}/{number} at level {level}: {puzzle.answer!r}, and by the other way {found}")
    return puzzle


def puzzle_rows(kind: str, size: int, seed: int, level: int | None = None) -> Iterator[dict[str, Any]]:
    """`size` rows of a kind with the reasoning as `reasoning_content`; without a level 1, 2 and 3 take turns."""
    if kind not in KINDS:
        raise UserError(f"there is no puzzle kind {kind!r}; there are {', '.join(KINDS)}")
    levels = range(KINDS[kind].least, LEVELS[-1] + 1)
    if level is not None and level not in levels:
        raise UserError(f"level={level} is none of {kind}'s: {', '.join(map(str, levels))}")
    for number in range(size):
        puzzle = checked(kind, seed, number, LEVELS[number % len(LEVELS)] if level is None else level)
        yield {
            "id": f"{kind}-{seed}-{number}",
            "source": PREFIX + kind,
            "subject": kind,
            "level": puzzle.level,
            "answer": puzzle.answer,
            "tolerance": puzzle.tolerance,
            "messages": [
                {"role": "user", "content": puzzle.question},
                {
                    "role": "assistant",
                    "reasoning_content": puzzle.reasoning,
                    "content": f"\\boxed{{{puzzle.answer}}}",
                },
            ],
        }
