"""The law school admission test in AGIEval: `lsat:ar` (analytical), `lsat:lr` (logical), `lsat:rc` (reading); MIT."""

from __future__ import annotations

from evaluation.judging.judges import Verdict, letter
from evaluation.judging.questions import Question
from evaluation.tasks import LETTERS, Task
from nano3.cli import UserError

PARTS = {"ar": "analytical reasoning", "lr": "logical reasoning", "rc": "reading comprehension"}


def task(variant: str) -> Task:
    """Raises `UserError` for a part that there is not."""
    if variant not in PARTS:
        raise UserError(f"lsat has the parts {', '.join(PARTS)}; say --task lsat:ar")
    return Task(
        f"lsat:{variant}",
        f"law school admission test, {PARTS[variant]}",
        _judge,
        form="lsat",
        method=LETTERS,
        data=f"hub:hails/agieval-lsat-{variant}@main?split=test",
    )


def _judge(question: Question, answer: str) -> Verdict:
    return letter(question.answer, answer, question.choices)
