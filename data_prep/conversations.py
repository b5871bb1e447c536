"""Conversations as preparation, generation and the overlap tools read them, and the chat JSONL that they write.

One row is `{"id": ..., "source": ..., "weight": ..., "messages": [...]}`. For evaluation the question of a row is
everything but its last message, and the answer is that message's `content`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.chat import check_messages, check_weight
from nano3.cli import UserError, fresh_file
from nano3.rows import Row, open_rows


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row; `where` is `file:number` for messages to the user, `weight` its share in the loss."""

    id: str
    source: str
    messages: list[dict[str, Any]]
    where: str
    weight: float = 1.0

    @property
    def question(self) -> str:
        """The user's words, without the system prompt and the answers."""
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")


class Conversations:
    """The conversations of an input, read once and row by row in constant memory.

    `source` is anything that `nano3.rows.open_rows` takes. A row needs `messages`; `id` defaults to `file:number`,
    `source` to the input's name, and `weight`, by which the loss multiplies the weights of the row's messages, to 1. A
    field that is null was not given: Arrow writes nulls beside rows that have one. White space around
    `reasoning_content` is stripped: the format puts its own newlines there, and a tokenizer might join the two. Raises
    `UserError` with file and number for a row that cannot be used.
    """

    def __init__(self, source: Path | str) -> None:
        self.rows = open_rows(source)

    def __iter__(self) -> Iterator[Conversation]:
        for row in self.rows:
            yield _conversation(row, self.rows.name)

    @property
    def name(self) -> str:
        """The input's name without its ending."""
        return self.rows.name

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What was read, once all of it was: names and SHA-256 of files, the commit of a hub data set."""
        return self.rows.facts


def _conversation(row: Row, source: str) -> Conversation:
    fields, where = {key: value for key, value in row.fields.items() if value is not None}, row.where
    if "messages" not in fields:
        raise UserError(f"{where}: a row must be a JSON object with 'messages'")
    if fields.get("tools"):
        raise UserError(f"{where}: tool definitions ('tools') are not rendered; describe them in the system message")
    messages = [_given(message) for message in fields["messages"]] if isinstance(fields["messages"], list) else ()
    try:
        check_messages(messages)
        check_weight("this row", fields.get("weight", 1))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for message in messages:
        if message.get("reasoning_content"):
            message["reasoning_content"] = message["reasoning_content"].strip()
    weight = float(fields.get("weight", 1))
    return Conversation(str(fields.get("id", where)), str(fields.get("source", source)), list(messages), where, weight)


def _given(message: Any) -> Any:
    """A message without the fields that are null; `content` may be, beside tool calls."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def write_rows(path: Path | str, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSONL, whole or not at all, and returns how many. An existing file is replaced."""
    count = 0
    with fresh_file(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
