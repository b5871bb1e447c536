"""Held-out questions with known answers, in the same chat JSONL as training data.

One row: {"id": ..., "source": ..., "messages": [..., {"role": "assistant", "content": ANSWER}]}. The last message is
the expected answer; everything before it is the question. `id` defaults to file:line, `source` to the file's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano3.cli import UserError
from nano3.conversations import Conversation, Conversations


@dataclass(frozen=True)
class Question:
    """A conversation that waits for the model's turn, and what that turn should say."""

    id: str
    source: str
    messages: tuple[dict[str, Any], ...]
    answer: str
    tools: tuple[dict[str, Any], ...] = ()

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
    questions: dict[str, Question] = {}
    for row in Conversations(path):
        question = _question(row)
        if question.id in questions:
            raise UserError(f"{row.where}: id {question.id} comes twice; ids pair the answers of two models")
        questions[question.id] = question
        if len(questions) == limit:
            break
    return list(questions.values())


def _question(row: Conversation) -> Question:
    *asked, answer = row.messages
    if not asked or answer["role"] != "assistant" or asked[-1]["role"] == "assistant":
        raise UserError(f"{row.where}: the last message must be the assistant's answer to the one before it")
    return Question(row.id, row.source, tuple(asked), answer["content"], tuple(row.tools))
