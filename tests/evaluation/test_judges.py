"""Judges against outputs that were labelled by hand, against GSM8K's own answers, and against their known traps."""

from __future__ import annotations

from functools import partial

import pytest

from evaluation.judging import judges
from evaluation.judging.extraction import after_thinking
from evaluation.judging.judges import UNFINISHED, Verdict
from evaluation.judging.reasoning_form import FORMS, reasoning_form
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


@pytest.mark.parametrize(
    "output",
    [
        *("It's B.", "Hence B.", "So, B.", "Answer - B", "[B]", "<answer>B</answer>", '{"answer": "B"}', "answer: b"),
        *("B\n\nExplanation: A is wrong, since it shrinks.", "B, because A is wrong", "The answer is B, not C."),
        *("Among the options, B is the right answer.", "The answer is:\n\nB", "**B) Hyperplasia**"),
        "So (A) is out, and it is dysplasia only rarely. The answer is B",
    ],
)
def test_ways_to_state_a_letter(output):
    assert judged("letter", "B", output).outcome == "right"


@pytest.mark.parametrize(
    ("expected", "output"),
    [
        *(("-7", "answer is -7"), ("12", "The answer is about 12."), ("18", "<answer>18</answer>"), ("18", "It is 18")),
        *(
            ("5", "Therefore x equals 5."),
            ("3/4", "Thus the answer is 3/4 of a cup."),
            ("1000000", "Answer: 1,000,000"),
        ),
    ],
)
def test_ways_to_state_a_value(expected, output):
    assert judged("mathematics", expected, output).outcome == "right"


@pytest.mark.parametrize(
    ("form", "text", "finished"),
    [
        ("kept", "<think>\n1+1 is 2\n</think>\n\n\\boxed{3}", True),  # wrong, and in form
        ("kept", "1+1 is 2\n</think>\n\n\\boxed{2}", True),  # the prompt opened the block
        ("no reasoning", "\\boxed{2}", True),
        ("no reasoning", "<think>\n\n</think>\n\n\\boxed{2}", True),
        ("not closed", "<think>\n1+1 is", False),
        ("not closed", "1+1 is", False),
        ("not closed", "<think>\n1+1 is 2", True),
        ("several blocks", "<think>a</think><think>b</think>2", True),
        ("several blocks", "a</think>b</think>2", True),
        ("text before", "Well: <think>1+1 is 2</think>2", True),
        ("no answer", "<think>1+1 is 2</think>\n", True),
    ],
)
def test_the_form_of_reasoning_is_told_apart_from_what_it_says(form, text, finished):
    assert reasoning_form(text, finished) == form
    assert form in FORMS
