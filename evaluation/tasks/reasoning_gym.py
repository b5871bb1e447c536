"""Any task of reasoning-gym, judged by its own `score_answer`: `--task reasoning-gym:syllogism --limit 200`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from evaluation.judging.judges import Verdict, scored
from evaluation.judging.questions import Question
from evaluation.tasks import Task
from nano3.cli import UserError


def task(variant: str) -> Task:
    """Raises `UserError` for a name that reasoning-gym does not have, with the nearest that it has."""
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if variant not in DATASETS:
        raise UserError(f"reasoning-gym has no task {variant!r}{_nearest(variant, DATASETS)}")
    score = get_score_answer_fn(variant)

    def judge(question: Question, answer: str) -> Verdict:
        return scored(question.data, answer, lambda text, entry: float(score(answer=text, entry=entry)))

    def make(count: int, seed: int) -> Iterator[Question]:
        return _questions(variant, count, seed)

    return Task(f"reasoning-gym:{variant}", f"reasoning-gym's {variant}", judge, room=256, make=make)


def _questions(name: str, count: int, seed: int) -> Iterator[Question]:
    """The items of data_prep/generate.py, which hashes the seed with the task's name: reasoning-gym makes item i of
    seed s from s + i, so that its seeds 1 and 2 share all items but one. Tasks with many right answers give none."""
    import reasoning_gym

    own = int(hashlib.sha256(f"{name}:{seed}".encode()).hexdigest()[:7], 16)
    dataset: Any = reasoning_gym.create_dataset(name, size=count, seed=own)
    for number in range(count):
        entry = dataset[number]
        answer = "" if entry["answer"] is None else str(entry["answer"])
        asked = ({"role": "user", "content": str(entry["question"]).strip()},)
        yield Question(f"{name}-{seed}-{number}", f"reasoning-gym/{name}", asked, answer, written=answer, data=entry)


def _nearest(name: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; say --task reasoning-gym:NAME, such as chain_sum"
