"""ReClor: reading comprehension with logic, 500 in the validation split (non-commercial).

The test split has no answers.
"""

from __future__ import annotations

from evaluation.judging.judges import Verdict, letter
from evaluation.judging.questions import Question
from evaluation.tasks import LETTERS, Task, no_variant


def task(variant: str) -> Task:
    no_variant("reclor", variant)
    return Task(
        "reclor",
        "reading comprehension with logic",
        _judge,
        form="reclor",
        method=LETTERS,
    )


def _judge(question: Question, answer: str) -> Verdict:
    return letter(question.answer, answer, question.choices)
