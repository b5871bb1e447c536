r"""The public reasoning challenge: puzzles by hidden rules, the answer in `\boxed{}`, numbers within one hundredth."""

from __future__ import annotations

from evaluation.judging.judges import Verdict, number
from evaluation.judging.questions import Question
from evaluation.tasks import Task, no_variant

TOLERANCE = 0.01
"""Relative: the challenge compares numbers to a hundredth."""


def task(variant: str) -> Task:
    no_variant("reasoning-challenge", variant)
    return Task("reasoning-challenge", "puzzles by hidden rules", _judge, room=1024)


def _judge(question: Question, answer: str) -> Verdict:
    return number(question.answer, answer, TOLERANCE, boxed=True)
