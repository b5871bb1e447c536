"""Any task of reasoning-gym, judged by its own `score_answer`: `--task reasoning-gym:syllogism --limit 200`."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.sources.reasoning_gym import check_task, fixed_day, items
from evaluation.judging.judges import Verdict, scored
from evaluation.judging.questions import Question
from evaluation.tasks import Task


def task(variant: str) -> Task:
    """Raises `UserError` for a name that reasoning-gym does not have, with the nearest that it has."""
    from reasoning_gym.factory import get_score_answer_fn

    check_task(variant)
    score = get_score_answer_fn(variant)

    def judge(question: Question, answer: str) -> Verdict:
        with fixed_day():
            return scored(question.data, answer, lambda text, entry: float(score(answer=text, entry=entry)))

    def make(count: int, seed: int) -> Iterator[Question]:
        return _questions(variant, count, seed)

    return Task(f"reasoning-gym:{variant}", f"reasoning-gym's {variant}", judge, room=256, make=make)


def _questions(name: str, count: int, seed: int) -> Iterator[Question]:
    """The items of data_prep/generate.py; tasks with many right answers give none to compare with."""
    for number, entry in enumerate(items(name, count, seed)):
        answer = "" if entry["answer"] is None else str(entry["answer"])
        asked = ({"role": "user", "content": str(entry["question"]).strip()},)
        yield Question(f"{name}-{seed}-{number}", f"reasoning-gym/{name}", asked, answer, written=answer, data=entry)
