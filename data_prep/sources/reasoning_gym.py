"""reasoning-gym's procedural tasks: questions with answers that its own `score_answer` can judge.

Package reasoning-gym 0.1.25, Apache-2.0.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from nano3.cli import UserError


def reasoning_gym_rows(task: str, size: int, seed: int, **params: Any) -> Iterator[dict[str, Any]]:
    """`size` questions with answers of a reasoning-gym task, the same for the same arguments.

    `params` are fields of the task's configuration. reasoning-gym makes item i of seed s from s + i, so that its
    seeds 1 and 2 share all items but one: the seed given here is hashed with the task's name first.
    """
    dataset = _reasoning_gym(task, size, int(hashlib.sha256(f"{task}:{seed}".encode()).hexdigest()[:7], 16), params)
    for number in range(size):
        item = dataset[number]
        yield {
            "id": f"{task}-{seed}-{number}",
            "source": f"reasoning-gym/{task}",
            "messages": [
                {"role": "user", "content": str(item["question"]).strip()},
                {"role": "assistant", "content": str(item["answer"])},
            ],
        }


def _reasoning_gym(task: str, size: int, seed: int, params: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"reasoning-gym has no task {task!r}{_nearest(task, DATASETS)}")
    known = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    for key in params:
        if key not in known:
            raise UserError(f"task {task} has no parameter {key!r}{_nearest(key, known)}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **params)
    except (AssertionError, TypeError, ValueError) as error:
        given = " ".join(f"{key}={value}" for key, value in params.items())
        raise UserError(f"task {task} does not take size={size} {given}: {error or 'out of range'}") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
