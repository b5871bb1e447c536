"""What counts as right, and intervals: by hand, and equal to published ones."""

from __future__ import annotations

import math

import pytest

from evaluation.score import compare, gain_interval, is_correct, normalize, wilson_interval
from nano3.cli import UserError


def test_normalization_touches_white_space_only():
    assert normalize("  1,\t2 \n 3 ") == "1, 2 3"
    assert is_correct(" 1, 2\n", "1, 2")
    assert not is_correct("1,2", "1, 2")
    assert not is_correct("Yes", "yes")
    assert not is_correct("", "")


def test_wilson_interval_by_hand():
    # 0 of n: [0, z²/(n + z²)]; n of n mirrors it; one half lies symmetric around 1/2
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)), abs=1e-12)
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1.0), abs=1e-12)
    low, high = wilson_interval(250, 500)
    assert (low + high, high - low) == pytest.approx((1, (z2 / (500 + z2)) ** 0.5), abs=1e-12)


def paired(both: int, tuned_only: int, base_only: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Base and tuned answers with these counts."""
    cells = [(True, True)] * both + [(False, True)] * tuned_only + [(True, False)] * base_only
    base, tuned = zip(*(cells + [(False, False)] * neither), strict=True)
    return list(base), list(tuned)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998, table III, method 10
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al., Statistics with Confidence, 2000, table 6.2
    ],
)
def test_gain_interval_equals_published_examples(cells, low, high):
    digits = len(str(low)) - 2
    assert gain_interval(*paired(*cells)) == pytest.approx((low, high), abs=0.51 * 10**-digits)


def test_gain_interval_is_paired_symmetric_and_never_empty():
    base, tuned = paired(40, 420, 10, 30)
    low, high = gain_interval(base, tuned)
    assert low < 410 / 500 < high
    assert gain_interval(tuned, base) == pytest.approx((-high, -low))
    # large n: close to the normal formula, variance (b + c - (b - c)²/n) / n²
    spread = 1.96 * math.sqrt(430 - 410**2 / 500) / 500
    assert (high - low) / 2 == pytest.approx(spread, rel=0.03)
    # the same accuracies, but agreeing question by question: a narrower interval
    agreeing, crossing = gain_interval(*paired(200, 50, 0, 250)), gain_interval(*paired(0, 250, 200, 50))
    assert agreeing[1] - agreeing[0] < 0.5 * (crossing[1] - crossing[0])
    low, high = gain_interval(*paired(0, 50, 0, 0))
    assert high == pytest.approx(1)
    assert 0.85 < low < 0.95
    low, high = gain_interval(*paired(25, 0, 0, 25))
    assert low == pytest.approx(-high)
    assert 0 < high < 0.1


def test_comparison_pairs_by_id():
    def result(flags: dict[str, bool]) -> dict:
        return {"answers": [{"id": key, "correct": flag} for key, flag in flags.items()]}

    report = compare(result({"a": True, "b": False, "c": False}), result({"c": True, "b": True, "a": True}))
    assert (report["n"], report["base_accuracy"], report["tuned_accuracy"]) == (3, 1 / 3, 1.0)
    assert report["gain"] == pytest.approx(2 / 3)
    assert report["ci95_gain"] == list(gain_interval([True, False, False], [True, True, True]))
    with pytest.raises(UserError, match="different questions"):
        compare(result({"a": True}), result({"b": True}))
