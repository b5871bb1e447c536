"""From the rows of an input to documents: which turns of a conversation become one, rendered, with their loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from data_prep.chat import Segment, is_empty, own_texts, without_reasoning
from data_prep.forms.form import Form
from data_prep.own_template import TemplateCheck
from data_prep.store import StoreWriter
from data_prep.summary import Finds, Turns
from data_prep.tokens import TOKENIZERS, ChatTokenizer
from nano3.cli import UserError
from nano3.conversations import Conversation

BATCH = 1024
"""Conversations encoded together: enough for the tokenizer's threads, a few megabytes of memory."""


@dataclass(frozen=True)
class Options:
    """How rows become documents.

    Args:
        thinking: False leaves every `reasoning_content` out.
        split: one document per user message where earlier turns have reasoning; else these turns are context only.
        no_loss: `data_prep.chat.PARTS` of the turns that are context only.
        drop_null_arguments: whether an argument that is null is left out of its call; else the call says `None`.
        form: of the rows; None guesses it.
        ignored: keys that are left out of every row.
        evaluation_data: whether rows may be used whose publishers allow evaluation only. The store says so, and nothing
            trains on it.
        backend: what encodes, one of `data_prep.tokens.BACKENDS`.
        order: a row key whose number each document keeps, for packs in that order; `length` needs no keeping.
    """

    thinking: bool = True
    split: bool = True
    no_loss: tuple[str, ...] = ()
    drop_null_arguments: bool = False
    order: str | None = None
    form: Form | None = None
    ignored: tuple[str, ...] = ()
    evaluation_data: bool = False
    backend: str = TOKENIZERS

    @property
    def kept(self) -> str | None:
        """The row key that the store keeps."""
        return None if self.order == "length" else self.order


@dataclass(frozen=True)
class Document:
    """One document of the store before it is encoded; `turns` are the assistant's in it."""

    row: Conversation
    segments: list[Segment]
    turns: int


def add_documents(
    rows: Iterator[Conversation],
    encoder: ChatTokenizer,
    template: TemplateCheck,
    writer: StoreWriter,
    turns: Turns,
    finds: Finds,
    options: Options,
    report: Callable[[int], None],
) -> None:
    """Appends the documents of all rows to a store that is being written; `report` is told how many rows were read."""
    while batch := list(islice(rows, BATCH)):
        documents = [document for row in batch for document in _documents(row, encoder, template, finds, options)]
        if documents:
            _add_batch(documents, encoder, writer, turns, options)
        report(len(batch))


def _add_batch(
    documents: Sequence[Document], encoder: ChatTokenizer, writer: StoreWriter, turns: Turns, options: Options
) -> None:
    rows = [document.row for document in documents]
    places = [row.where for row in rows]
    batch = encoder.encode_batch([document.segments for document in documents], places)
    supervised = np.logical_or.reduceat(batch.mask != 0, np.cumsum(batch.lengths) - batch.lengths)
    if not supervised.all():
        place = places[int(np.argmin(supervised))]
        raise UserError(f"{place}: every supervised token has weight 0 by its spans; remove the row")
    if any(row.weight != 1 for row in rows):
        weights = np.array([row.weight for row in rows], np.float32)
        batch = batch._replace(mask=batch.mask * weights.repeat(batch.lengths))
    for document in documents:
        turns.count(document.turns, document.segments)
    origins = [(os.path.basename(file), int(number)) for file, _, number in (place.rpartition(":") for place in places)]
    orders = [_order(row, options.kept) for row in rows] if options.kept else ()
    try:
        writer.add_batch(batch, [row.source for row in rows], origins, orders)
    except UserError as error:
        raise UserError(f"{places[0]} to {places[-1]}: {error}") from error


def _documents(
    row: Conversation, encoder: ChatTokenizer, template: TemplateCheck, finds: Finds, options: Options
) -> list[Document]:
    """The documents of one row: one, several where turns are split, none where nothing in it is to be learned."""
    finds.read(row)
    if row.fields.get("evaluation_only") and not options.evaluation_data:
        raise UserError(
            f"{row.where}: {row.source} is for evaluation only ({row.fields.get('terms', 'its terms say so')}); "
            "--evaluation-data makes a store that validates and is never trained on"
        )
    if not row.weight:
        raise UserError(f"{row.where}: 'weight' is 0, so there is nothing to learn from it; remove the row")
    messages = row.messages if options.thinking else without_reasoning(row.messages)
    if options.drop_null_arguments:
        messages = [_without_null_arguments(message) for message in messages]
    parts = encoder.format.split_turns(messages) if options.split else [(messages, 0)]
    try:
        encoder.check_texts(own_texts(messages, row.tools))
        template.check(messages, row.tools)
        rendered = [
            (
                encoder.format.render(
                    part, options.thinking, tools=row.tools, no_loss=options.no_loss, trained_from=start
                ),
                part,
            )
            for part, start in parts
        ]
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    documents = [
        Document(row, segments, sum(message["role"] == "assistant" for message in part))
        for segments, part in rendered
        if any(segment.supervised for segment in segments)
    ]
    if len(parts) > 1:
        finds.split_rows += 1
        finds.split_documents += len(documents)
    if not documents and any(message["role"] == "assistant" and is_empty(message) for message in messages):
        finds.drop_empty(row)
    elif not documents:
        raise UserError(
            f"{row.where}: no supervised token, since no assistant message with a weight above 0 follows the "
            "last user message; add the answer or remove the row"
        )
    return documents


def _without_null_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"arguments": {name: value for name, value in call["arguments"].items() if value is not None}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _order(row: Conversation, column: str) -> float:
    value = row.fields.get(column)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e300 < value < 1e300:
        raise UserError(f"{row.where}: {column!r} is {str(value)[:40]!r}; --order-by needs a number in every row")
    return float(value)
