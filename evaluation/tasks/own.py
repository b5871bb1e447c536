"""Your own questions as chat JSONL: exact match, or letters where the rows have `choices`."""

from __future__ import annotations

from evaluation.judging.judges import Verdict, exact, letter
from evaluation.judging.questions import Question
from evaluation.tasks import Task, no_variant


def task(variant: str) -> Task:
    no_variant("own", variant)
    return Task("own", "your own questions, exact match", _judge)


def _judge(question: Question, answer: str) -> Verdict:
    return letter(question.answer, answer, question.choices) if question.choices else exact(question.answer, answer)
