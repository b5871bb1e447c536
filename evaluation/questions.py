"""Held-out questions with known answers, in the same chat JSONL as training data.

One row: {"id": ..., "source": ..., "messages": [..., {"role": "assistant", "content": ANSWER}]}. The last message is
the expected answer; everything before it is the question. `id` defaults to file:line, `source` to the file's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano3.cli import UserError
from nano3.rows import open_rows


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
    """The questions of an input that `nano3.rows` can read, the first `limit` of them where given.

    Raises `UserError` for a missing or empty file, naming file and line for a row that is not what we expect or an id
    that comes twice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}; it must be at least 1")
    rows = open_rows(path)
    questions: dict[str, Question] = {}
    for fields, where in rows:
        question = _question(fields, where, rows.name)
        if question.id in questions:
            raise UserError(f"{where}: id {question.id} comes twice; ids pair the answers of two models")
        questions[question.id] = question
        if len(questions) == limit:
            break
    return list(questions.values())


def _question(row: dict[str, Any], where: str, source: str) -> Question:
    """One row; `where` (file:number) and `source` stand in for what it does not say."""
    if "messages" not in row:
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
