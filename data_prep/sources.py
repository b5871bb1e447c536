"""Where conversations come from: chat JSONL files, and reasoning-gym's procedural tasks.

One row is `{"id": ..., "source": ..., "weight": ..., "messages": [...]}`. For evaluation the question of a row is
everything but its last message, and the answer is that message's `content`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.chat import check_messages, check_weight
from nano3.cli import UserError, fresh_file


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row of a chat JSONL file; `where` is `file:line` for messages to the user, `weight` its share in the loss."""

    id: str
    source: str
    messages: list[dict[str, Any]]
    where: str
    weight: float = 1.0

    @property
    def question(self) -> str:
        """The user's words, without the system prompt and the answers."""
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")


def check_file(path: Path | str) -> Path:
    """Refuses a path that is not a file with something in it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}; give a JSONL file with one conversation ('messages') per line")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; give a JSONL file with one conversation ('messages') per line")
    return path


def read_chat(path: Path | str) -> Iterator[Conversation]:
    """Reads chat JSONL line by line, in constant memory; blank lines are skipped.

    A row needs `messages`; `id` defaults to `file:line`, `source` to the file's name without its ending, and `weight`,
    by which the loss multiplies the weights of the row's messages, to 1. White space around `reasoning_content` is
    stripped: the format puts its own newlines there, and a tokenizer might join the two. Raises `UserError` with file
    and line for a row that cannot be used.
    """
    path = check_file(path)
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                empty = False
                yield _conversation(line, path, f"{path}:{number}")
    if empty:
        raise UserError(f"{path} has only blank lines; give a JSONL file with one conversation ('messages') per line")


def _conversation(line: bytes, path: Path, where: str) -> Conversation:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); every line must be one JSON object") from error
    if not isinstance(row, dict) or "messages" not in row:
        raise UserError(f"{where}: a row must be a JSON object with 'messages'")
    if row.get("tools"):
        raise UserError(f"{where}: tool definitions ('tools') are not rendered; describe them in the system message")
    try:
        check_messages(row["messages"])
        check_weight("this row", row.get("weight", 1))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    messages = [dict(message) for message in row["messages"]]
    for message in messages:
        if message.get("reasoning_content"):
            message["reasoning_content"] = message["reasoning_content"].strip()
    weight = float(row.get("weight", 1))
    return Conversation(str(row.get("id", where)), str(row.get("source", path.stem)), messages, where, weight)


def write_rows(path: Path | str, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSONL, whole or not at all, and returns how many. An existing file is replaced."""
    count = 0
    with fresh_file(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


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
