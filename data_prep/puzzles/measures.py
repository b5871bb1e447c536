"""Unit conversion with a hidden factor, and gravity with another constant: y = factor * f(x), shown to two decimals.

The factor is a multiple of a step that the question names, so the examples leave exactly one. Values are computed in
whole numbers, and rounded half up. Answers count within 1 % too, as in the public challenge.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

from data_prep.puzzles.puzzle import Pairs, Puzzle, question

TOLERANCE = 0.01
"""Relative error of an answer that still counts."""
CENT = Decimal("0.01")
HALF = Fraction(1, 200)
"""Half of the last decimal that is shown."""
EXAMPLES = {1: 3, 2: 4, 3: 5}


@dataclass(frozen=True)
class Law:
    """A kind's law: its words, the steps and ranges of the factor by level, and the unit of what goes in."""

    kind: str
    rule: str
    ask: str
    symbol: str
    step: Fraction
    factors: tuple[range, range, range]
    """The factor in steps, by level."""
    inputs: tuple[range, range, range]
    """What goes in, in hundredths, by level."""
    squared: bool
    offsets: tuple[range, range, range] = (range(1), range(1), range(1))
    """What is added, in tenths, by level; only unit conversion at level 3 adds something."""

    def feature(self, x: Fraction) -> Fraction:
        """What the factor multiplies: x, or half of x squared."""
        return x * x / 2 if self.squared else x


UNITS = Law(
    "units",
    "A length is converted by an unknown factor, a multiple of 0.001. Results are rounded to two decimals.",
    "Convert {x}.",
    "factor",
    Fraction(1, 1000),
    (range(200, 1000), range(200, 4000), range(200, 4000)),
    (range(500, 5000), range(500, 5000), range(500, 5000)),
    False,
    (range(1), range(1), range(-50, 51)),
)
GRAVITY = Law(
    "gravity",
    "On another planet things fall d = g * t^2 / 2 metres in t seconds. g is a multiple of 0.01. d is rounded to two "
    "decimals. Times, then distances:",
    "How far does a thing fall in {x} s?",
    "g",
    Fraction(1, 100),
    (range(200, 1000), range(200, 2500), range(200, 2500)),
    (range(100, 300), range(100, 500), range(50, 600)),
    True,
)
OFFSET = " Then a fixed length is added, a multiple of 0.1 from -5.0 to 5.0."


def rounded(value: Fraction) -> Decimal:
    """To two decimals, half up, exactly."""
    return (Decimal(value.numerator) / Decimal(value.denominator)).quantize(CENT, ROUND_HALF_UP)


def draw_units(source: random.Random, level: int) -> Puzzle | None:
    """A conversion; None when two factors fit, or a value lies on the edge between two roundings."""
    return _draw(UNITS, source, level)


def draw_gravity(source: random.Random, level: int) -> Puzzle | None:
    """A planet; None as for units."""
    return _draw(GRAVITY, source, level)


def _draw(law: Law, source: random.Random, level: int) -> Puzzle | None:
    factor = law.step * source.choice(law.factors[level - 1])
    offset = Fraction(source.choice(law.offsets[level - 1]), 10)
    *inputs, query = (Fraction(x, 100) for x in source.sample(law.inputs[level - 1], EXAMPLES[level] + 1))
    values = [factor * law.feature(x) + offset for x in [*inputs, query]]
    # A value on the edge between two roundings has two right answers.
    if any((value * 200).denominator == 1 and (value * 100).denominator != 1 for value in values):
        return None
    pairs = [(_two(x), str(rounded(value))) for x, value in zip(inputs, values[:-1], strict=True)]
    fits = fitting(law, pairs, level)
    if fits != [(factor, offset)]:
        return None
    rule = law.rule + (OFFSET if len(law.offsets[level - 1]) > 1 else "")
    text = question(rule, pairs, law.ask.format(x=_two(query)))
    reasons = _reasoning(law, pairs, factor, offset, query)
    return Puzzle(law.kind, level, text, reasons, str(rounded(values[-1])), TOLERANCE)


def fitting(law: Law, pairs: Pairs, level: int) -> list[tuple[Fraction, Fraction]]:
    """Every (factor, offset) of the law that gives all examples: for each offset an interval of whole steps.

    In whole numbers of 1/20,000 of a step, where features, shown values and halves of a hundredth are whole.
    """
    steps = int(1 / law.step)
    scaled = [(int(law.feature(Fraction(x)) * 20_000), int(Fraction(y) * 20_000)) for x, y in pairs]
    found = []
    for tenth in law.offsets[level - 1]:
        least, most = 0, steps * 1_000_000
        for feature, value in scaled:
            middle = value - 2000 * tenth
            least = max(least, -(-(middle - 100) * steps // feature))
            most = min(most, (middle + 100) * steps // feature)
            if least > most:
                break
        found += [(law.step * n, Fraction(tenth, 10)) for n in range(least, most + 1)]
    return found


def _bounds(law: Law, x: str, y: str, offset: Fraction) -> tuple[Fraction, Fraction]:
    """Between which factors an example holds."""
    feature, value = law.feature(Fraction(x)), Fraction(y) - offset
    return (value - HALF) / feature, (value + HALF) / feature


def _reasoning(law: Law, pairs: Pairs, factor: Fraction, offset: Fraction, query: Fraction) -> str:
    """The widest example bounds the factor, the step picks it, the others check it, the query uses it."""
    lines = []
    if offset:
        (x1, y1), (x2, y2) = min(pairs, key=lambda p: Fraction(p[0])), max(pairs, key=lambda p: Fraction(p[0]))
        run, rise = Fraction(x2) - Fraction(x1), Fraction(y2) - Fraction(y1)
        slope = f"{_two(rise)} over {_two(run)}: about {float(rise / run):.3f} for each unit"
        lines.append(f"Between {x1} and {x2} the result grows by {slope}.")
        lines.append(f"The added length that fits all lines is {float(offset):.1f}.")
    x, y = max(pairs, key=lambda pair: Fraction(pair[0]))
    low, high = _bounds(law, x, y, offset)
    what = f"{x}^2 / 2 = {_plain(law.feature(Fraction(x)))}" if law.squared else x
    lines.append(f"From {x}: {law.symbol} is between {float(low):.5f} and {float(high):.5f} ({y} over {what}).")
    lines.append(f"The multiple that fits all lines is {_plain(factor)}.")
    for x, y in pairs:
        lines.append(f"{x}: {_product(law, Fraction(x), factor, offset)}, shown as {y}")
    value = factor * law.feature(query) + offset
    return "\n".join([*lines, f"{_two(query)}: {_product(law, query, factor, offset)}, so {rounded(value)}"])


def _product(law: Law, x: Fraction, factor: Fraction, offset: Fraction) -> str:
    added = f" + {_plain(offset)}" if offset > 0 else f" - {_plain(-offset)}" if offset < 0 else ""
    return f"{_plain(factor)} * {_plain(law.feature(x))}{added} = {_plain(factor * law.feature(x) + offset)}"


def _two(value: Fraction) -> str:
    return f"{Decimal(value.numerator) / Decimal(value.denominator):.2f}"


def _plain(value: Fraction) -> str:
    """A decimal without trailing zeros; every value here has one that ends."""
    return f"{(Decimal(value.numerator) / Decimal(value.denominator)).normalize():f}"
