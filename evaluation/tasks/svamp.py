"""SVAMP: word problems whose wording was varied, 300 in the test split (ChilleD/SVAMP; MIT)."""

from __future__ import annotations

from evaluation.judging.judges import Verdict, mathematics
from evaluation.judging.questions import Question
from evaluation.tasks import Task, no_variant


def task(variant: str) -> Task:
    no_variant("svamp", variant)
    return Task(
        "svamp",
        "word problems, varied",
        _judge,
        form="svamp",
        room=512,
        data="hub:ChilleD/SVAMP@main?split=test",
    )


def _judge(question: Question, answer: str) -> Verdict:
    return mathematics(question.answer, answer)
