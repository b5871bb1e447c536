"""LogiQA: logical reasoning from civil-service exams, 651 in the test split (lucasmccabe/logiqa; non-commercial)."""

from __future__ import annotations

from evaluation.judging.judges import Verdict, letter
from evaluation.judging.questions import Question
from evaluation.tasks import LETTERS, Task, no_variant


def task(variant: str) -> Task:
    no_variant("logiqa", variant)
    return Task(
        "logiqa",
        "logical reasoning",
        _judge,
        form="logiqa",
        method=LETTERS,
        data="hub:lucasmccabe/logiqa@main?split=test",
    )


def _judge(question: Question, answer: str) -> Verdict:
    return letter(question.answer, answer, question.choices)
