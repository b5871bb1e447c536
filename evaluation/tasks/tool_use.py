"""Tool use as the Berkeley Function-Calling Leaderboard asks it (package bfcl-eval 2026.3.23; Apache-2.0).

The expected calls are those of the last message, or what its row has as `accepted`. Without either no tool fits: the
right answer calls none.
"""

from __future__ import annotations

from evaluation.judging.judges import Verdict, tool_calls
from evaluation.judging.questions import Question
from evaluation.tasks import Task, no_variant


def task(variant: str) -> Task:
    no_variant("tool-use", variant)
    return Task("tool-use", "calls of the right tools with right arguments", _judge, form="bfcl", room=256)


def _judge(question: Question, answer: str) -> Verdict:
    return tool_calls(question.data, answer)
