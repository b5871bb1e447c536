"""GSM8K: 1,319 grade-school word problems whose answer is a number (openai/gsm8k; MIT)."""

from __future__ import annotations

from evaluation.judging.judges import Verdict, mathematics
from evaluation.judging.questions import Question
from evaluation.tasks import Task, no_variant


def task(variant: str) -> Task:
    no_variant("gsm8k", variant)
    return Task(
        "gsm8k",
        "grade-school word problems",
        _judge,
        form="gsm8k",
        room=512,
        data="hub:openai/gsm8k@main?config=main&split=test",
    )


def _judge(question: Question, answer: str) -> Verdict:
    return mathematics(question.answer, answer)
