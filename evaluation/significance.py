"""How sure a score is: intervals for an accuracy and for a gain, tests, and how many questions a gain needs.

Torch-free. Intervals are two-sided at 95 %, in closed form, so that the same answers always give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

Z95 = 1.959963984540054
"""The standard normal's 97.5 % point."""
Z80 = 0.8416212335729143
"""Its 80 % point: the power that `questions_needed` asks for."""
SMALL_GROUP = 30
"""Below so many questions a group's figure carries a mark: its interval is wider than 35 points at one half."""


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22:209-212, 1927).

    (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n): never outside [0, 1], and of sensible width at 0 and 1.
    """
    return _wilson(correct / n, n)


def _wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share `p` of `n` answers, which need not be whole."""
    spread = Z95 * Z95 / n
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
    both = sum(b and t for b, t in zip(base, tuned, strict=True))
    return gain_interval_of_counts(len(base), both, sum(base), sum(tuned))


def gain_interval_of_counts(n: int, both: int, right_base: int, right_tuned: int) -> tuple[float, float]:
    """The same from how many of `n` questions both models got right, and each of them."""
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


def shares_gain_interval(
    base: Sequence[float] | np.ndarray, tuned: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """95 % interval of the gain where a question's score is a share: that of its right samples.

    Newcombe's way of combining two intervals (`gain_interval`), with `clustered_interval` of each side in place of
    Wilson's and the correlation of the questions' shares as φ. A question counts once, however many samples it has.
    """
    if len(base) != len(tuned) or not len(base):
        raise ValueError(f"need the same questions, at least one: {len(base)} and {len(tuned)} scores")
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    p_base, p_tuned = float(before.mean()), float(after.mean())
    (low_base, high_base), (low_tuned, high_tuned) = mean_interval(before), mean_interval(after)
    spread = float(before.std() * after.std())
    phi = float(((before - p_base) * (after - p_tuned)).mean()) / spread if spread else 0.0
    gain = p_tuned - p_base
    down = _combine(p_tuned - low_tuned, high_base - p_base, phi)
    return gain - down, gain + _combine(high_tuned - p_tuned, p_base - low_base, phi)


def paired_t(base: Sequence[float], tuned: Sequence[float]) -> float:
    """Two-sided p value that two models' shares have the same mean: Student's paired t test over the questions, whose
    error is clustered by question. 1 where nothing differs; where all differ by the same, that of the sign test."""
    from scipy.stats import t

    off = np.asarray(tuned, dtype=float) - np.asarray(base, dtype=float)
    n, mean = len(off), float(off.mean())
    if not off.any():
        return 1.0
    error = float(off.std(ddof=1)) / sqrt(n) if n > 1 else 0.0
    return float(2 * t.sf(abs(mean) / error, n - 1)) if error else mcnemar(n, 0)


def mcnemar(fixed: int, broken: int) -> float:
    """Exact two-sided p value that `fixed` and `broken` come from the same rate (McNemar, Psychometrika 12:153, 1947).

    Of the questions that the two models answer differently, `fixed` are right after only and `broken` before only.
    Under no change each is a fair coin: p = 2 * P(X <= min) for X ~ Binomial(fixed + broken, 1/2), at most 1. Counted
    in whole numbers, so exact at any size.
    """
    n, low = fixed + broken, min(fixed, broken)
    term = total = 1
    for k in range(1, low + 1):
        term = term * (n - k + 1) // k
        total += term
    return min(1.0, _ratio(2 * total, n))


def _ratio(count: int, power: int) -> float:
    """count / 2**power, also where both are too large for a float."""
    shift = max(0, count.bit_length() - 1000)
    return math.ldexp(count >> shift, shift - power)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values of several tests, by name (Scandinavian J. of Statistics 6:65-70, 1979).

    Rejecting those below 0.05 keeps the chance of any false one at 5 %, however the tests depend on each other.
    """
    adjusted: dict[str, float] = {}
    largest, count = 0.0, len(p_values)
    for number, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (count - number) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def clustered_interval(scores: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of a mean of scores in [0, 1] that go together in clusters: k samples of a question, a passage.

    The error is clustered: se^2 = G/(G-1) * sum over clusters of (sum of score - mean)^2 / N^2 with G clusters and N
    scores (Cameron and Miller, J. Human Resources 50:317-372, 2015). The interval is Wilson's for the number of
    independent answers with that error, p(1-p)/se^2, times (z/t)^2 for Student's t with G - 1 degrees of freedom (Korn
    and Graubard, Survey Methodology 24:193-201, 1998). Clusters that are all wrong, or all right, count as G answers.
    """
    if len(scores) != len(clusters) or not scores:
        raise ValueError(f"need a cluster for each score, at least one: {len(scores)} and {len(clusters)}")
    values = np.asarray(scores, dtype=float)
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    return _clustered(values, np.bincount([places[cluster] for cluster in clusters], values - values.mean()))


def _clustered(values: np.ndarray, off: np.ndarray) -> tuple[float, float]:
    """The same from the scores (N,) and, for each cluster, the sum of their differences from the mean (G,)."""
    from scipy.stats import t

    n, count, p = len(values), len(off), float(values.mean())
    if count == 1 or not 0 < p < 1:
        return _wilson(p, count)
    variance = count / (count - 1) * float(off @ off) / n**2
    independent = p * (1 - p) / variance if variance else float(n)
    return _wilson(p, independent * (Z95 / float(t.ppf(0.975, count - 1))) ** 2)


def mean_interval(scores: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean score of questions: Wilson's where each is 0 or 1, clustered where some are shares."""
    values = np.asarray(scores, dtype=float)
    if np.isin(values, (0, 1)).all():
        return wilson_interval(int(values.sum()), len(values))
    return _clustered(values, values - values.mean())


def questions_needed(gain: float, disagreement: float) -> int:
    """Questions after which a paired test at 5 % finds a true `gain` four times in five.

    `disagreement` is the share of questions that the two models answer differently, at least the gain. Connor's formula
    (Biometrics 43:207-211, 1987): n = (z_95 * sqrt(d) + z_80 * sqrt(d - gain^2))^2 / gain^2.
    """
    gain = abs(gain)
    if not 0 < gain <= disagreement <= 1:
        raise ValueError(f"gain {gain} must be above 0 and at most the disagreement {disagreement}, itself at most 1")
    return math.ceil((Z95 * sqrt(disagreement) + Z80 * sqrt(disagreement - gain * gain)) ** 2 / gain**2)


@dataclass(frozen=True)
class Group:
    """Questions of one kind: the score of each, 0, 1 or the share of its right samples."""

    scores: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        return sum(self.scores) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """As `mean_interval`."""
        return mean_interval(self.scores)

    @property
    def small(self) -> bool:
        """Whether the figure needs its mark: fewer than `SMALL_GROUP` questions."""
        return self.n < SMALL_GROUP


def by_group(names: Sequence[str], scores: Sequence[float]) -> dict[str, Group]:
    """Group name -> its questions, the largest first; `names` and `scores` are of the same questions."""
    found: dict[str, list[float]] = {}
    for name, score in zip(names, scores, strict=True):
        found.setdefault(name, []).append(score)
    return {name: Group(tuple(found[name])) for name in sorted(found, key=lambda name: (-len(found[name]), name))}


def difference_interval(first: int, n_first: int, second: int, n_second: int) -> tuple[float, float]:
    """95 % interval of first/n_first - second/n_second, two shares of different questions.

    Method 10 of Newcombe, Statistics in Medicine 17:873-890, 1998: Wilson's intervals combined as in `gain_interval`
    without correlation.
    """
    (low_first, high_first), (low_second, high_second) = (
        wilson_interval(first, n_first),
        wilson_interval(second, n_second),
    )
    p, q = first / n_first, second / n_second
    return p - q - _combine(p - low_first, high_second - q, 0.0), p - q + _combine(high_first - p, q - low_second, 0.0)
