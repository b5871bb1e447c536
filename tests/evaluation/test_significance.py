"""Intervals and tests: by hand, equal to published ones and to scipy, and right as often as they say."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
from scipy.stats import binomtest

from evaluation.comparison import by_groups, compare, enough, paired, table
from evaluation.significance import (
    by_group,
    clustered_interval,
    gain_interval,
    gain_interval_of_counts,
    holm,
    mcnemar,
    mean_interval,
    paired_t,
    questions_needed,
    shares_gain_interval,
    wilson_interval,
)
from nano3.cli import UserError


def test_wilson_interval_by_hand():
    # 0 of n: [0, z²/(n + z²)]; n of n mirrors it; one half lies symmetric around 1/2
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)), abs=1e-12)
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1.0), abs=1e-12)
    low, high = wilson_interval(250, 500)
    assert (low + high, high - low) == pytest.approx((1, (z2 / (500 + z2)) ** 0.5), abs=1e-12)


def counted(both: int, tuned_only: int, base_only: int, neither: int) -> tuple[list[bool], list[bool]]:
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
    assert gain_interval(*counted(*cells)) == pytest.approx((low, high), abs=0.51 * 10**-digits)


def test_gain_interval_is_paired_symmetric_and_never_empty():
    base, tuned = counted(40, 420, 10, 30)
    low, high = gain_interval(base, tuned)
    assert low < 410 / 500 < high
    assert gain_interval(tuned, base) == pytest.approx((-high, -low))
    # large n: close to the normal formula, variance (b + c - (b - c)²/n) / n²
    spread = 1.96 * math.sqrt(430 - 410**2 / 500) / 500
    assert (high - low) / 2 == pytest.approx(spread, rel=0.03)
    # the same accuracies, but agreeing question by question: a narrower interval
    agreeing, crossing = gain_interval(*counted(200, 50, 0, 250)), gain_interval(*counted(0, 250, 200, 50))
    assert agreeing[1] - agreeing[0] < 0.5 * (crossing[1] - crossing[0])
    low, high = gain_interval(*counted(0, 50, 0, 0))
    assert high == pytest.approx(1)
    assert 0.85 < low < 0.95
    low, high = gain_interval(*counted(25, 0, 0, 25))
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


def test_mcnemar_is_scipys_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == 2 / 32
    numbers = random.Random(0)
    for _ in range(1000):
        fixed, broken = numbers.randint(0, 300), numbers.randint(0, 300)
        expected = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
        assert mcnemar(fixed, broken) == pytest.approx(expected, rel=1e-9)
        assert mcnemar(broken, fixed) == mcnemar(fixed, broken)
    assert 0 < mcnemar(2500, 1500) < 1e-50  # 2**4000 fits into no float


def test_holm_by_hand():
    found = holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert found == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_groups_say_how_small_they_are():
    found = by_group(["x"] * 29 + ["y"] * 30, [True] * 29 + [False] * 30)
    assert list(found) == ["y", "x"]
    assert (found["x"].accuracy, found["x"].small) == (1.0, True)
    assert (found["y"].accuracy, found["y"].small) == (0.0, False)
    assert found["y"].interval == wilson_interval(0, 30)


def within(hits: int, what: str, n: int) -> None:
    """Of 10,000 intervals 95 % hold the truth, within 1 %; `pytest -s` shows how many do."""
    print(f"{what}, n = {n}: {hits / 10_000:.2%}")
    assert 9400 < hits < 9600


@pytest.mark.parametrize("n", [20, 300, 4183])
def test_the_intervals_cover_what_they_say(n):
    """10,000 simulations each, accuracies drawn anew: 95 % of the intervals hold the truth, within 1 %."""
    random_numbers = np.random.default_rng(n)
    count = 10_000
    wilson = [wilson_interval(correct, n) for correct in range(n + 1)]
    truth = random_numbers.uniform(0.05, 0.95, count)
    found = (wilson[int(x)] for x in random_numbers.binomial(n, truth))
    within(sum(low <= p <= high for (low, high), p in zip(found, truth, strict=True)), "Wilson", n)
    cells = random_numbers.dirichlet([1, 1, 1, 1], count)
    hits = 0
    for share in cells:
        both, tuned_only, base_only, _ = map(int, random_numbers.multinomial(n, share))
        low, high = gain_interval_of_counts(n, both, both + base_only, both + tuned_only)
        hits += low <= share[1] - share[2] <= high
    within(hits, "Newcombe", n)


@pytest.mark.full
@pytest.mark.parametrize("n", [20, 300, 4183])
def test_the_clustered_interval_covers_what_it_says(n):
    """Four samples of each question, questions of very different difficulty."""
    random_numbers, hits = np.random.default_rng(n), 0
    for _ in range(10_000):
        mean, spread = random_numbers.uniform(0.2, 0.8), random_numbers.uniform(0.5, 5)
        difficulty = random_numbers.beta(spread * mean, spread * (1 - mean), n)
        low, high = mean_interval(random_numbers.binomial(4, difficulty) / 4)
        hits += low <= mean <= high
    within(hits, "shares", n)


@pytest.mark.full
@pytest.mark.parametrize("n", [20, 300, 4183])
def test_the_interval_of_a_gain_in_shares_covers_what_it_says(n):
    """Four samples of each question by each model, which find the same questions hard."""
    random_numbers, hits = np.random.default_rng(n), 0
    for _ in range(10_000):
        mean, spread, gain = (
            random_numbers.uniform(0.2, 0.7),
            random_numbers.uniform(0.5, 5),
            random_numbers.uniform(0, 1),
        )
        hard = random_numbers.beta(spread * mean, spread * (1 - mean), n)
        better = hard + gain * hard * (1 - hard)  # its mean: mean + gain * E[hard (1 - hard)]
        truth = gain * (mean * (1 - mean) * spread / (spread + 1))
        before, after = (random_numbers.binomial(4, chance) / 4 for chance in (hard, better))
        low, high = shares_gain_interval(before, after)
        hits += low <= truth <= high
    within(hits, "gain in shares", n)


def test_a_gain_in_shares_by_hand():
    """Three questions of four samples: shares change by 1/4, 1/4 and 1, 1/2 on average, with an error of 1/4: t = 2."""
    before, after = [0.25, 0.5, 0.0], [0.5, 0.75, 1.0]
    assert paired_t(before, after) == pytest.approx(1 - 2 / math.sqrt(6))  # Student's t of 2 degrees of freedom
    assert paired_t(before, before) == 1
    assert paired_t([0.25, 0.5], [0.5, 0.75]) == 0.5  # both by the same: the sign test of two
    low, high = shares_gain_interval(before, after)
    assert low < 0.5 < high
    assert shares_gain_interval(after, before) == pytest.approx((-high, -low))
    # shares that rise alike in every question are surer than shares that cross
    alike, cross = [0.5, 0.75] * 50, [0.75, 0.5] * 50
    one, other = shares_gain_interval([0.25, 0.5] * 50, alike), shares_gain_interval([0.25, 0.5] * 50, cross)
    assert one[1] - one[0] < 0.5 * (other[1] - other[0])
    assert mean_interval([0, 1, 1]) == wilson_interval(2, 3)
    assert mean_interval([0.5, 1, 1]) == clustered_interval([0.5, 1, 1], "abc")


def sampled(shares: dict[str, float]) -> dict:
    rows = [
        {"id": key, "source": "s", "share": share, "correct": share > 0.5, "samples": []}
        for key, share in shares.items()
    ]
    return {"answers": rows}


def test_several_samples_have_one_meaning_everywhere():
    """The gain is the change of the mean share, in accuracies, interval, test and groups alike; a vote decides nothing:
    two questions of three go from 1/2 to 3/4, which a vote would count as fixed, from 1/6 to 2/3 in all."""
    base, tuned = sampled({"a": 0.5, "b": 0.5, "c": 0.0}), sampled({"a": 0.75, "b": 0.75, "c": 0.5})
    report = compare(base, tuned)
    assert (report["base_accuracy"], report["tuned_accuracy"]) == pytest.approx((1 / 3, 2 / 3))
    assert report["gain"] == pytest.approx(1 / 3)
    assert report["ci95_gain"] == list(shares_gain_interval([0.5, 0.5, 0], [0.75, 0.75, 0.5]))
    assert report["p_value"] == paired_t([0.5, 0.5, 0], [0.75, 0.75, 0.5])
    assert report["fixed"] == 2
    [line] = by_groups(base, tuned, "source")
    assert (line.before.accuracy, line.after.accuracy, line.pair.gain) == pytest.approx((1 / 3, 2 / 3, 1 / 3))
    assert line.after.interval == mean_interval([0.75, 0.75, 0.5])
    assert " 33.33 " in table([line])
    assert paired(base, tuned).test == "paired t"


def test_samples_of_one_question_are_no_new_questions():
    """Each question's four samples agree: the interval is that of the questions, not of four times as many."""
    scores, clusters = [1.0] * 40 + [0.0] * 40, [number // 4 for number in range(80)]
    low, high = clustered_interval(scores, clusters)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert wilson_interval(10, 20)[0] == pytest.approx(low, abs=0.02)
    assert high - low > 1.8 * (wilson_interval(40, 80)[1] - wilson_interval(40, 80)[0])
    assert clustered_interval([0.0, 0.0], ["a", "b"]) == wilson_interval(0, 2)


def test_the_questions_that_a_gain_needs_find_it_four_times_in_five():
    assert questions_needed(0.05, 0.05) == math.ceil(((1.959964 + 0.841621 * math.sqrt(0.95)) / math.sqrt(0.05)) ** 2)
    need, random_numbers = questions_needed(0.08, 0.3), np.random.default_rng(0)
    found = [mcnemar(*map(int, random_numbers.multinomial(need, [0.19, 0.11, 0.7])[:2])) < 0.05 for _ in range(2000)]
    assert 0.74 < sum(found) / 2000 < 0.84  # the exact test is a little careful
    for gain, differing in ((0.1, 0.05), (0, 0.5)):
        with pytest.raises(ValueError, match="must be above 0"):
            questions_needed(gain, differing)


PUBLISHED = {
    "Psychiatry": (16, 5, 14, "31.25", "87.50"),
    "Biochemistry": (171, 62, 132, "36.26", "77.19"),
    "Physiology": (171, 57, 126, "33.33", "73.68"),
    "Pharmacology": (243, 87, 176, "35.80", "72.43"),
    "Pathology": (337, 103, 243, "30.56", "72.11"),
    "Medicine": (295, 105, 193, "35.59", "65.42"),
    "Surgery": (369, 123, 240, "33.33", "65.04"),
    "Anaesthesia": (34, 15, 22, "44.12", "64.71"),
    "Anatomy": (234, 79, 150, "33.76", "64.10"),
    "Ophthalmology": (58, 17, 37, "29.31", "63.79"),
    "Social & Preventive Medicine": (129, 45, 82, "34.88", "63.57"),
    "Gynaecology & Obstetrics": (224, 76, 141, "33.93", "62.95"),
    "Microbiology": (122, 35, 76, "28.69", "62.30"),
    "ENT": (53, 20, 33, "37.74", "62.26"),
    "Radiology": (69, 25, 42, "36.23", "60.87"),
    "Skin": (17, 5, 10, "29.41", "58.82"),
    "Pediatrics": (234, 77, 127, "32.91", "54.27"),
    "Forensic Medicine": (67, 28, 36, "41.79", "53.73"),
    "Dental": (1318, 476, 694, "36.12", "52.66"),
    "Orthopaedics": (20, 7, 7, "35.00", "35.00"),
}
"""The published medical table: questions, right before and after, and its percentages."""
OMITTED = {"Unknown": (2, 2, 1, "100.00", "50.00")}
"""The row that the published table leaves out and its totals count."""


def medical(right: int) -> dict:
    """A result with those counts, `right` 1 before and 2 after; who is right beyond the counts does not matter here."""
    rows = []
    for subject, counts in (PUBLISHED | OMITTED).items():
        for number in range(counts[0]):
            rows.append({"id": f"{subject}-{number}", "subject": subject, "correct": number < counts[right]})
    return {"answers": rows}


def test_the_published_medical_table_rebuilds_from_its_counts():
    lines = {line.name: line for line in by_groups(medical(1), medical(2))}
    text = table(list(lines.values()))
    assert set(lines) - set(PUBLISHED) == {"Unknown"}
    for name, (n, _, _, before, after) in (PUBLISHED | OMITTED).items():
        [row] = [row for row in text.splitlines() if row.startswith(name + " ")]
        low, high = lines[name].after.interval
        assert f" {n} " in row
        assert re.search(rf" {before} \[.* {after} \[", row)
        assert f"[{100 * low:5.1f}, {100 * high:5.1f}]" in row
        assert (f"{name} *" in row) == (n < 30)
    assert [name for name, line in lines.items() if line.marked] == ["Orthopaedics", "Skin", "Psychiatry", "Unknown"]
    everything = text.splitlines()[-2]
    assert re.match(r"all +4183 +34\.64 \[ 33\.2,  36\.1\] +61\.73 \[ 60\.2,  63\.2\] +\+27\.09", everything)
    assert text.splitlines()[-1].startswith("* fewer than 30 questions")


def test_enough_questions_or_too_few():
    pair = paired(medical(1), medical(2))
    assert "4,183 questions are enough for a gain of 5.0 points" in enough(pair, 0.05)
    assert "4,183 questions are too few for a gain of 0.5 points" in enough(pair, 0.005)


def answered(verdicts: dict[str, tuple[bool, bool]], **hashes: str) -> dict:
    rows = [{"id": key, "correct": written, "letter_correct": known} for key, (written, known) in verdicts.items()]
    return {"answers": rows, "hashes": {"questions": "q", "prompts": "p", "template": "t", "sampling": "s"} | hashes}


def test_a_gain_is_format_and_knowledge():
    """Ten questions: four more are written right, one more is known by its letter: 0.4 = 0.3 + 0.1."""
    base = answered({str(n): (n < 2, n < 5) for n in range(10)})
    tuned = answered({str(n): (n < 6, n < 6) for n in range(10)})
    report = compare(base, tuned)
    assert (report["gain"], report["knowledge"]) == (pytest.approx(0.4), pytest.approx(0.1))
    assert report["format"] + report["knowledge"] == pytest.approx(report["gain"])
    assert (report["fixed"], report["broken"], report["p_value"]) == (4, 0, 2 / 16)


@pytest.mark.parametrize("part", ["questions", "prompts", "template", "sampling"])
def test_results_compare_only_when_what_was_asked_is_equal(part):
    rows = {"1": (True, True)}
    with pytest.raises(UserError, match=f"cannot be compared: the .*{part.rstrip('s')}"):
        compare(answered(rows), answered(rows, **{part: "other"}))
