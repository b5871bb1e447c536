"""Exact match, and how sure it is: intervals for an accuracy and for the gain between two models on the same questions.

Torch-free. All intervals are two-sided at 95 %, in closed form, so that the same answers always give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from nano3.cli import UserError

Z95 = 1.959963984540054
"""The standard normal's 97.5 % point."""


def normalize(text: str) -> str:
    """An answer as it is compared: outer white space removed, every inner run of white space one space.

    Case, punctuation and digits count, as the answers come from generators that spell them one way only.
    """
    return " ".join(text.split())


def is_correct(answer: str, expected: str) -> bool:
    """Exact match after `normalize`. An empty answer is never correct."""
    return bool(normalize(answer)) and normalize(answer) == normalize(expected)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22:209-212, 1927).

    (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n): never outside [0, 1], and of sensible width at 0 and 1.
    """
    p, spread = correct / n, Z95 * Z95 / n
    centre = (p + spread / 2) / (1 + spread)
    half = Z95 * sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def gain_interval(base: Sequence[bool], tuned: Sequence[bool]) -> tuple[float, float]:
    """95 % interval of the gain in accuracy, tuned minus base, on the same questions in the same order.

    Method 10 of Newcombe, Statistics in Medicine 17:2635-2650, 1998: the Wilson intervals [l, u] of both accuracies p
    are combined to gain - sqrt((pt-lt)² - 2φ(pt-lt)(ub-pb) + (ub-pb)²) and gain + sqrt((ut-pt)² - 2φ(ut-pt)(pb-lb) +
    (pb-lb)²). φ, the correlation of the pairs, has n/2 taken off its numerator where that is positive, down to 0.
    Unlike a bootstrap or the normal formula it keeps a width when every question changes, or none does.
    """
    if len(base) != len(tuned) or not base:
        raise ValueError(f"need the same questions, at least one: {len(base)} and {len(tuned)} answers")
    n = len(base)
    both = sum(b and t for b, t in zip(base, tuned, strict=True))
    right_base, right_tuned = sum(base), sum(tuned)
    neither = n - right_base - right_tuned + both
    numerator: float = both * neither - (right_tuned - both) * (right_base - both)
    if numerator > 0:
        numerator = max(0.0, numerator - n / 2)
    margins = right_base * (n - right_base) * right_tuned * (n - right_tuned)
    phi = numerator / sqrt(margins) if margins else 0.0
    p_base, p_tuned = right_base / n, right_tuned / n
    (low_base, high_base), (low_tuned, high_tuned) = wilson_interval(right_base, n), wilson_interval(right_tuned, n)
    down = _combine(p_tuned - low_tuned, high_base - p_base, phi)
    up = _combine(high_tuned - p_tuned, p_base - low_base, phi)
    gain = p_tuned - p_base
    return gain - down, gain + up


def _combine(first: float, second: float, phi: float) -> float:
    """Length of the third side of a triangle with these two and correlation `phi` as the cosine between them."""
    return sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def compare(base: dict[str, Any], tuned: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    """Models side by side, from results of `evaluation.evaluate`: the report's score fields.

    Every model has NAME_accuracy and ci95_NAME (Wilson); the gain is that of tuned over base. Answers are paired by
    question id; `UserError` when the results do not answer the same questions.
    """
    results = {"base": base, "tuned": tuned, **others}
    correct = {name: {row["id"]: row["correct"] for row in result["answers"]} for name, result in results.items()}
    for answers in correct.values():
        odd = sorted(correct["base"].keys() ^ answers.keys())
        if odd:
            raise UserError(
                f"the results answer different questions ({len(odd)} differ, first {odd[0]}); score all of them anew"
            )
    ids = list(correct["base"])
    verdicts = {name: [answers[key] for key in ids] for name, answers in correct.items()}
    n, right = len(ids), {name: sum(answers) for name, answers in verdicts.items()}
    return {
        "n": n,
        **{f"{name}_accuracy": count / n for name, count in right.items()},
        "gain": (right["tuned"] - right["base"]) / n,
        **{f"ci95_{name}": list(wilson_interval(count, n)) for name, count in right.items()},
        "ci95_gain": list(gain_interval(verdicts["base"], verdicts["tuned"])),
    }
