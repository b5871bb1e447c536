"""Held-out questions with known answers, in the same chat JSONL as training data.

One row: {"id": ..., "source": ..., "messages": [..., {"role": "assistant", "content": ANSWER}]}. The last message is
the expected answer; everything before it is the question. `id` defaults to file:line, `source` to the file's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano3.cli import UserError


@dataclass(frozen=True)
class Question:
    """A conversation that waits for the model's turn, and what that turn should say."""

    id: str
    source: str
    messages: tuple[dict[str, Any], ...]
    answer: str

    @property
    def text(self) -> str:
        """The last thing that the user said, for reports."""
        return str(self.messages[-1]["content"])


def load_questions(path: Path | str, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file, the first `limit` of them where given.

    Raises `UserError` for a missing or empty file, naming file and line for a row that is not what we expect or an id
    that comes twice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}; it must be at least 1")
    try:
        # Not splitlines(): inside a JSON string U+2028 and others are text, not the end of a row.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError:
        raise UserError(f"no questions at {path}; give a JSONL file with one conversation per line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None
    questions: dict[str, Question] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _parse(line, f"{path}:{number}", Path(path).stem)
        if question.id in questions:
            raise UserError(f"{path}:{number}: id {question.id} comes twice; ids pair the answers of two models")
        questions[question.id] = question
        if len(questions) == limit:
            break
    if not questions:
        raise UserError(f"{path} holds no questions; give a JSONL file with one conversation per line")
    return list(questions.values())


def _parse(line: str, where: str, source: str) -> Question:
    """One row; `where` (file:line) and `source` stand in for what it does not say."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or "messages" not in row:
        raise UserError(f"{where}: a row must be a JSON object with 'messages'")
    messages = row["messages"]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] == "assistant":
        raise UserError(f"{where}: the last message must be the assistant's answer to the one before it")
    return Question(
        str(row.get("id", where)), str(row.get("source", source)), tuple(messages[:-1]), messages[-1]["content"]
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
