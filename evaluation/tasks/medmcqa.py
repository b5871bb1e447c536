"""MedMCQA: medical entrance questions, judged by letter (openlifescienceai/medmcqa; Apache-2.0).

Everyone scores the 4,183 of the validation split: the test split has no answers.
"""

from __future__ import annotations

from evaluation.judging.judges import Verdict, letter
from evaluation.judging.questions import Question
from evaluation.tasks import LETTERS, Task, no_variant


def task(variant: str) -> Task:
    no_variant("medmcqa", variant)
    return Task(
        "medmcqa",
        "medical entrance questions",
        _judge,
        form="medmcqa",
        method=LETTERS,
        completion=_completion,
        data="hub:openlifescienceai/medmcqa@main?split=validation",
    )


def _judge(question: Question, answer: str) -> Verdict:
    return letter(question.answer, answer, question.choices)


def _completion(question: Question) -> str:
    """As lm-evaluation-harness asks it: the prompt that its published figures belong to."""
    stem = question.text.rpartition("\n\nA. ")[0]
    options = "".join(f"{name}. {text}\n" for name, text in zip("ABCD", question.choices, strict=True))
    return f"Question: {stem}\nChoices:\n{options}Answer:"
