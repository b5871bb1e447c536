"""Held-out questions with known answers: what a task makes of the rows of a file.

A chat row (`nano3/conversations.py`) is a question of any task. Its last message is the expected answer; everything
before it is the question. It may also have `choices` (texts of the options; `answer` is then the letter), `answer` (the
expected answer without the words around it that the last message may hold), `subject`, and `accepted`: for each call of
a tool its function with all values that each argument may have. Without that the last message's own calls are expected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano3.cli import UserError
from nano3.conversations import Conversation, Conversations
from nano3.row_keys import LETTERS
from nano3.rows import Rows, open_rows


@dataclass(frozen=True)
class Question:
    """A conversation that waits for the model's turn, and what that turn should say.

    `written` and `reasoning` are what training would teach the model to say: the longest of them bounds the answers.
    `choices` are the options' texts where the answer is a letter, `data` is the judge's. What is `evaluation_only` must
    not be trained on.
    """

    id: str
    source: str
    messages: tuple[dict[str, Any], ...]
    answer: str
    tools: tuple[dict[str, Any], ...] = ()
    choices: tuple[str, ...] = ()
    subject: str = ""
    written: str = ""
    reasoning: str = ""
    data: Any = None
    evaluation_only: bool = False

    @property
    def text(self) -> str:
        """The last thing that the user said, for reports."""
        return str(self.messages[-1]["content"])


def load_questions(source: Path | str, limit: int | None = None, form: str = "") -> list[Question]:
    """The questions of an input that `nano3.rows` can read, the first `limit` of them where given.

    Rows that are no chat rows are read as the data set that `form` names (data_prep/convert.py lists them). Raises
    `UserError` for a missing or empty file, naming file and row for one that is not what we expect or an id that comes
    twice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}; it must be at least 1")
    found: dict[str, Question] = {}
    for row in Conversations(_chat_rows(source, form)):
        question = _question(row)
        if question.id in found:
            raise UserError(f"{row.where}: id {question.id} comes twice; ids pair the answers of two models")
        found[question.id] = question
        if len(found) == limit:
            break
    return list(found.values())


def _chat_rows(source: Path | str, form: str) -> Rows | Path | str:
    """The input, through its form where its first row is no chat row; standard input holds chat rows."""
    if not form or str(source) == "-" or _are_chat_rows(source):
        return source
    from data_prep.chat_rows import ChatRows, form_named

    return ChatRows(source, form_named(form))


def _are_chat_rows(source: Path | str) -> bool:
    """Whether the first row is one; a folder may begin with a file that only its form can read."""
    try:
        return "messages" in next(iter(open_rows(source))).fields
    except UserError:
        if Path(source).is_dir():
            return False
        raise


def _question(row: Conversation) -> Question:
    *asked, said = row.messages
    if not asked or said["role"] != "assistant" or asked[-1]["role"] == "assistant":
        raise UserError(f"{row.where}: the last message must be the assistant's answer to the one before it")
    choices = tuple(map(str, row.fields.get("choices") or ()))
    expected = row.fields.get("answer", said["content"])
    return Question(
        id=row.id,
        source=row.source,
        messages=tuple(asked),
        answer=_letter_of(expected, choices, row.where) if choices else str(expected),
        tools=tuple(row.tools),
        choices=choices,
        subject=str(row.fields.get("subject") or ""),
        written=said["content"],
        reasoning=str(said.get("reasoning_content") or ""),
        data=row.fields.get("accepted", _calls(said)),
        evaluation_only=bool(row.fields.get("evaluation_only")),
    )


def _calls(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message, each argument with the one value that it has."""
    calls = said.get("tool_calls") or ()
    return [{one["name"]: {name: [value] for name, value in one.get("arguments", {}).items()}} for one in calls]


def _letter_of(answer: Any, choices: Sequence[str], where: str) -> str:
    letters = LETTERS[: len(choices)]
    if not 2 <= len(choices) <= len(LETTERS) or str(answer) not in letters:
        raise UserError(
            f"{where}: 'choices' has {len(choices)} texts and 'answer' is {answer!r}; give 2 to {len(LETTERS)} choices "
            "and the letter of the right one"
        )
    return str(answer)


def questions_sha256(questions: Sequence[Question]) -> str:
    """What identifies the questions with their answers, in order."""
    rows = [[one.id, one.messages, one.answer, one.choices, one.tools] for one in questions]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
