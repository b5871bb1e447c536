"""Judges against outputs that were labelled by hand, against GSM8K's own answers, and against their known traps."""

from __future__ import annotations

from functools import partial

import pytest

from evaluation.judging import judges
from evaluation.judging.extraction import after_thinking
from evaluation.judging.judges import UNFINISHED, Verdict
from tests.evaluation.labelled_outputs import ALL, CUT, LETTERS, LOGIC, LOGICAL, MATHEMATICS, MEDICAL

JUDGES = {
    "letter": partial(judges.letter, options=MEDICAL),
    "logic": partial(judges.letter, options=LOGIC),
    "mathematics": judges.mathematics,
    "boxed": partial(judges.number, tolerance=0.01, boxed=True),
    "exact": judges.exact,
}


def judged(kind: str, expected: str, output: str) -> Verdict:
    return UNFINISHED if output.endswith(CUT) else JUDGES[kind](expected, after_thinking(output))


@pytest.mark.parametrize(("kind", "expected", "outcome", "output"), ALL)
def test_an_output_is_judged_as_a_reader_judges_it(kind, expected, outcome, output):
    assert judged(kind, expected, output).outcome == outcome


def test_the_labelled_outputs_are_what_they_should_be():
    assert [len(part) for part in (LETTERS, MATHEMATICS, LOGICAL)] == [50, 50, 50]
    assert len({(kind, output) for kind, _, _, output in ALL}) == 150
    unclear = sum(outcome in ("ambiguous", "unfinished") for _, _, outcome, _ in ALL)
    assert unclear >= 50


def first_letter(text: str) -> str | None:
    """The rule of a public project: the first of the letters A to D anywhere in the text, whatever its case."""
    return next((character for character in text.upper() if character in "ABCD"), None)


def test_the_first_letter_of_a_text_is_no_answer():
    wrong = 0
    for kind, expected, outcome, output in LETTERS + [row for row in LOGICAL if row[0] == "logic"]:
        wrong += (first_letter(output.removesuffix(CUT)) == expected) != (outcome == "right")
        assert (judged(kind, expected, output).outcome == "right") == (outcome == "right")
    assert wrong >= 15
