"""What a named data set adds to a form of rows: its terms, and how its files are read where they need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.forms.form import Fields, Form, short, turn
from nano3.cli import UserError
from nano3.row_keys import LETTERS
from nano3.rows import Row, open_rows

Facts = list[dict[str, Any]]
"""What was read, as `nano3.rows.Rows.facts` has it; a source's `read` appends to it."""


def rows_as_they_are(source: Path | str, facts: Facts) -> Iterator[Row]:
    """The rows of an input, for a data set whose files need nothing else."""
    rows = open_rows(source)
    yield from rows
    facts += rows.facts


@dataclass(frozen=True)
class Source(Form):
    """A published data set.

    `terms` are its licence and what its publishers say about its use. With `evaluation_only` its rows say so, as
    those of any split but train do, and prepare.py makes a store of them only when asked to. `read` gives its rows, one
    question in each; `drop` says of a row why it is left out, or None. With `distinct` a question with its answer is
    kept once.
    """

    terms: str = ""
    evaluation_only: bool = False
    read: Callable[[Path | str, Facts], Iterator[Row]] = rows_as_they_are
    drop: Callable[[Fields], str | None] = lambda _fields: None
    distinct: bool = True


def number_of(fields: Fields, key: str, low: int, high: int) -> int:
    """A field that must be a whole number from `low` to `high`."""
    value = fields.get(key)
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)  # CSV knows no numbers
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{key!r} is {short(fields.get(key))}; it must be a whole number from {low} to {high}")
    return value


def list_of(fields: Fields, key: str, least: int, most: int) -> list[str]:
    """A field that must be a list of `least` to `most` texts, none of them blank."""
    value = fields.get(key)
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise UserError(f"{key!r} is {short(value)}; it must be a list of {least} to {most} texts")
    for place, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{key}[{place}] is {short(text)}; it must be text")
    return value


def worked(question: str, answer: str, thought: str = "") -> dict[str, Any]:
    """The chat row of a question with a free answer, in `\\boxed{}` where evaluation looks for it."""
    said = f"\\boxed{{{answer}}}"
    return {
        "messages": [turn("user", question), turn("assistant", said, reasoning_content=thought.strip())],
        "answer": answer,
    }


def asked_and_ideal(fields: Fields) -> tuple[str, str]:
    """Question and ideal answer of a row of OpenAI's `evals`: `input`, messages of which the last asks, and `ideal`."""
    messages, ideal = fields.get("input"), fields.get("ideal")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise UserError(f"'input' is {short(messages)}; its last message must be the user's question")
    if isinstance(ideal, list) and ideal:
        ideal = ideal[0]
    if not isinstance(ideal, str) or not ideal.strip():
        raise UserError(f"'ideal' is {short(fields.get('ideal'))}; it must be text")
    return last["content"], ideal


def letter_number(key: str, value: Any, count: int) -> int:
    """The number, from 0, of a letter that names one of `count` options."""
    if not isinstance(value, str) or len(value) != 1 or value.upper() not in LETTERS[:count]:
        raise UserError(f"{key!r} is {short(value)}; it must be a letter from A to {LETTERS[count - 1]}")
    return LETTERS.index(value.upper())
