"""Conversations: the rows of chat data, read in one way for training and for evaluation.

One row is `{"id": ..., "source": ..., "weight": ..., "tools": [...], "messages": [...]}`; only `messages` is required.
For evaluation the question of a row is everything but its last message. Messages and tools: nano3/messages.py.

A key that could change the prompt or the loss is understood or refused by name; the row's other keys travel along in
`fields`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nano3.documents import shown
from nano3.errors import UserError
from nano3.messages import check_weight, checked_messages, checked_tools
from nano3.row_keys import FACTS, is_harmless
from nano3.rows import Rows, open_rows

_UNDERSTOOD = {"messages", "id", "source", "weight", "tools", "functions", "system"}
_REFUSED = {
    "chat_template": "the template is the tokenizer folder's",
    "chat_template_kwargs": "leave out reasoning_content for a turn that does not think, and remove the key",
    "developer": "put its text into a system message",
    "documents": "put their text into a message",
    "function_call": "no call can be forced: the template has no words for it",
    "instruction": "convert the rows with data_prep/convert.py",
    "instructions": "put their text into a system message",
    "labels": "give 'weight' or 'loss' on the assistant messages, or 'spans'",
    "loss": "give it on the assistant messages, or 'weight' on the row",
    "loss_mask": "give 'weight' or 'loss' on the assistant messages, or 'spans'",
    "loss_weight": "the row's weight is called 'weight'",
    "mask": "give 'weight' or 'loss' on the assistant messages, or 'spans'",
    "parallel_tool_calls": "the template has no words for it",
    "prefix": "put its text into a message",
    "reasoning_content": "it belongs to an assistant message",
    "reasoning_effort": "the template has no words for it",
    "response_format": "the template has no words for it; describe the form in a message",
    "sample_weight": "the row's weight is called 'weight'",
    "spans": "they belong to an assistant message",
    "suffix": "put its text into a message",
    "system_prompt": "call it 'system', or make it the first message",
    "thinking": "give reasoning_content on the assistant messages",
    "tool_choice": "no call can be forced: the template has no words for it",
    "train": "give 'weight' or 'loss' on the assistant messages",
    "weights": "the row's weight is called 'weight'",
}
"""Keys of a row that would change the prompt or the loss, and what to do instead."""
_ON_OFF = {"reasoning": "on or off, as some data sets note; reasoning itself belongs to an assistant message"}
_PLAIN_KEYS = (_UNDERSTOOD | {*FACTS}) - {*_REFUSED, *_ON_OFF, "tools", "functions"}
"""Most rows have no other, and nothing to be checked in them."""


@dataclass(frozen=True)
class Conversation:
    """One row. `messages` and `tools` are as `checked_messages` and `checked_tools` return them, `where` is `file:line`
    for messages to the user, `weight` its share in the loss, `fields` what else the row says."""

    id: str
    source: str
    messages: list[dict[str, Any]]
    where: str
    weight: float = 1.0
    tools: list[dict[str, Any]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The user's words, without the system prompt and the answers."""
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")


def conversation(row: Mapping[str, Any], where: str, source: str) -> Conversation:
    """A row as a `Conversation`.

    Args:
        row: its keys, as JSON or Arrow give them; a key with null is a key that is not given.
        where: `file:line`, for messages, and the `id` of a row that has none.
        source: of a row that names none.

    Raises:
        UserError: with `where`, for a row that cannot be used as it is.
    """
    row = {key: value for key, value in row.items() if value is not None}
    try:
        if "messages" not in row:
            raise UserError(f"no 'messages'; the row has {', '.join(map(repr, row)) or 'nothing'}{_other_form(row)}")
        _check_row_keys(row)
        messages = checked_messages(_with_system(row))
        tools = checked_tools(row.get("tools") or row.get("functions") or [])
        check_weight("this row", row.get("weight", 1))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    fields = {key: value for key, value in row.items() if key not in _UNDERSTOOD}
    name = str(row.get("source", source))
    return Conversation(str(row.get("id", where)), name, messages, where, float(row.get("weight", 1)), tools, fields)


def _other_form(row: Mapping[str, Any]) -> str:
    """What the row looks like instead, and the remedy."""
    forms = {
        "conversations": "ShareGPT",
        "instruction": "Alpaca",
        "chosen": "a preference pair",
        "prompt": "prompt and completion",
        "question": "question and answer",
    }
    found = next((form for key, form in forms.items() if key in row), None)
    convert = "convert it with data_prep/convert.py"
    return f": this is the form of {found}; {convert}" if found else f"; {convert} --map"


def _check_row_keys(row: Mapping[str, Any]) -> None:
    if row.keys() <= _PLAIN_KEYS:
        return
    for key, value in row.items():
        if key in _REFUSED and value not in ("", [], {}):
            raise UserError(
                f"{key!r} would change the prompt or the loss and is not understood on a row: {_REFUSED[key]}"
            )
    for key, meaning in _ON_OFF.items():
        if str(row.get(key, "on")).lower() not in ("on", "off", "true", "false", ""):
            raise UserError(f"{key!r} is {shown(row[key])}; on a row it may say {meaning}")
    for key, value in row.items():
        if key not in _UNDERSTOOD and key not in FACTS and not is_harmless(key, value, row["messages"]):
            raise UserError(
                f"{key!r} may change the prompt or the loss and is not understood on a row; put it into a message, or "
                "leave it out with data_prep/convert.py --ignore"
            )
    if row.get("tools") and row.get("functions"):
        raise UserError("'tools' and 'functions' are both given; they are two names of one thing: keep 'tools'")


def _with_system(row: Mapping[str, Any]) -> Any:
    """The row's messages, headed by its `system` prompt where it has one."""
    messages, system = row["messages"], row.get("system", "")
    if not isinstance(system, str):
        raise UserError(f"'system' is {shown(system)}; it must be text")
    if not system or not isinstance(messages, list):
        return messages
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        raise UserError("'system' and a system message are both given; keep one")
    return [{"role": "system", "content": system}, *messages]


class Conversations:
    """The conversations of an input, read once and row by row in constant memory.

    `source` is anything that `nano3.rows.open_rows` takes, or rows that are open. Iterating raises `UserError`, with
    file and row, for a row that cannot be used.
    """

    def __init__(self, source: Path | str | Rows) -> None:
        self.rows = source if isinstance(source, Rows) else open_rows(source)

    def __iter__(self) -> Iterator[Conversation]:
        for row in self.rows:
            yield conversation(row.fields, row.where, self.rows.name)

    @property
    def name(self) -> str:
        """The input's name without its ending."""
        return self.rows.name

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What was read, once all of it was: names and SHA-256 of files, the commit of a hub data set."""
        return self.rows.facts
