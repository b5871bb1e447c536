"""Letter and position bias: models that like a letter, a place, or the right answer, are told apart."""

from __future__ import annotations

import pytest

from evaluation.bias import Turned, bias
from evaluation.judging.questions import Question
from nano3.cli import UserError
from nano3.row_keys import LETTERS

OPTIONS = ("red", "green", "blue", "grey")


def question(number: int) -> Question:
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", OPTIONS, strict=True))
    text = f"Which?\n\n{lines}\n\nAnswer with the letter of the right option."
    asked = ({"role": "user", "content": text},)
    return Question(str(number), "s", asked, "ABCD"[number % 4], choices=OPTIONS)


class Fake:
    """Scores letters by a rule on the question as it is asked."""

    def __init__(self, rule) -> None:
        self.rule = rule

    def letters(self, questions):
        return [[float(LETTERS[n] == self.rule(one)) for n in range(len(one.choices))] for one in questions]


def first_listed(one: Question) -> str:
    return one.text.split("\n\n")[1][0]


QUESTIONS = [question(number) for number in range(8)]
EVEN = [0.25] * 4


def test_turns_move_options_and_letters():
    turned = Turned(question(1), shift=1, relabel=1).question()  # green is right
    assert turned.text.splitlines()[2:6] == ["B. grey", "C. red", "D. green", "A. blue"]
    assert (turned.answer, turned.choices) == ("D", ("blue", "grey", "red", "green"))
    assert Turned(question(1), 0, 0).question() == question(1)


def test_a_model_that_likes_a_letter():
    found = bias(Fake(lambda _: "B"), QUESTIONS)
    assert found["by_letter"] == {"A": 0, "B": 1, "C": 0, "D": 0}
    assert list(found["by_place"].values()) == [0.5, 0.5, 0, 0]
    assert (found["accuracy"], found["steady"], found["largest_letter"]) == (0.25, 0, 0.75)


def test_a_model_that_likes_what_stands_first():
    found = bias(Fake(first_listed), QUESTIONS)
    assert list(found["by_place"].values()) == [1, 0, 0, 0]
    assert list(found["by_letter"].values()) == [0.5, 0.5, 0, 0]
    assert (found["accuracy"], found["steady"]) == (0.25, 0)


def test_a_model_that_knows_has_no_bias():
    found = bias(Fake(lambda one: one.answer), QUESTIONS)
    assert list(found["by_letter"].values()) == list(found["by_place"].values()) == EVEN
    assert (found["accuracy"], found["steady"]) == (1, 1)


def test_questions_that_cannot_be_turned_are_refused():
    with pytest.raises(UserError, match="options are not lines"):
        bias(Fake(first_listed), [Question("x", "s", ({"role": "user", "content": "?"},), "A", choices=OPTIONS)])
    with pytest.raises(UserError, match="equally many"):
        bias(Fake(first_listed), [question(0), Question("y", "s", question(0).messages, "A", choices=OPTIONS[:2])])
