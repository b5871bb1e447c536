"""MATH: competition problems, the answer an expression (EleutherAI/hendrycks_math, one part; give others as a file)."""

from __future__ import annotations

from evaluation.judging.judges import Verdict, mathematics
from evaluation.judging.questions import Question
from evaluation.tasks import Task, no_variant


def task(variant: str) -> Task:
    no_variant("math", variant)
    return Task(
        "math",
        "competition mathematics",
        _judge,
        form="math",
        room=1024,
        data="hub:EleutherAI/hendrycks_math@main?config=algebra&split=test",
    )


def _judge(question: Question, answer: str) -> Verdict:
    return mathematics(question.answer, answer)
