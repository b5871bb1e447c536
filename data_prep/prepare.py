"""Conversations -> token store with a pack index.

    python data_prep/prepare.py --input train.jsonl --tokenizer MODEL --out runs/data/train --seq-length 4096

Streams: memory does not grow with the data. The store appears whole or not at all. For another sequence length run
data_prep/repack.py, which leaves the tokens as they are; for validation data run this again with another `--out`.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, check_output, fresh_output, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.chat import PARTS, Segment, is_empty, own_texts, render, split_turns, without_reasoning
from data_prep.chat_rows import ChatRows, form_named
from data_prep.forms.form import Form
from data_prep.own_template import TemplateCheck
from data_prep.packing import build_packs, check_settings
from data_prep.store import StoreWriter
from data_prep.store_view import Viewer
from data_prep.summary import Finds, Turns, print_summary
from data_prep.tokens import ChatTokenizer
from data_prep.xray import print_documents, some_rows
from nano3.conversations import Conversation, Conversations
from nano3.pack_index import Curriculum
from nano3.rows import open_rows
from nano3.token_store import KIND, TokenStore, tokenizer_file

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


def prepare(
    inputs: Sequence[Path | str],
    tokenizer: Path,
    out: Path,
    seq_length: int,
    options: Options = Options(),
    **packing: Any,
) -> tuple[TokenStore, dict[str, Any]]:
    """Writes the token store `out` with its pack index and returns it with the index's facts (`packs.json`).

    `packing` are further arguments of `data_prep.packing.build_packs`. Raises `UserError`, and leaves `out` as it was,
    for input that cannot be used; where only the packs cannot be made, the store stays without them.
    """
    opened = [ChatRows(source, options.form, options.ignored) for source in inputs]
    encoder, template = ChatTokenizer(tokenizer), TemplateCheck(tokenizer)
    turns, finds = Turns(), Finds()
    with fresh_output(out, KIND) as temporary:
        writer = StoreWriter(temporary, options.kept)
        try:
            for chat in opened:
                with tqdm(Conversations(chat), desc=chat.name, unit="row", disable=None) as rows:
                    _add(iter(rows), encoder, template, writer, turns, finds, options)
                finds.take(chat)
            if not writer.documents:
                raise UserError(f"nothing is left to train on: all {finds.empty_rows} rows have empty answers only")
            writer.finish(
                encoder,
                tokenizer_folder=str(tokenizer),
                template=template.facts(),
                thinking=options.thinking,
                no_loss=list(options.no_loss),
                turns=vars(turns),
                finds=finds.facts(),
                inputs=[fact for chat in opened for fact in chat.facts],
            )
        finally:
            writer.close()
    try:
        facts = build_packs(TokenStore(out), seq_length, **packing)
    except UserError as error:
        raise UserError(f"{error}; the tokens stay in {out}: pack them with data_prep/repack.py") from error
    return TokenStore(out), facts


def _add(
    rows: Iterator[Conversation],
    encoder: ChatTokenizer,
    template: TemplateCheck,
    writer: StoreWriter,
    turns: Turns,
    finds: Finds,
    options: Options,
) -> None:
    while batch := list(islice(rows, BATCH)):
        documents = [document for row in batch for document in _documents(row, encoder, template, finds, options)]
        if documents:
            _add_batch(documents, encoder, writer, turns, options)


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
    parts = split_turns(messages) if options.split else [(messages, 0)]
    try:
        encoder.check_texts(own_texts(messages, row.tools))
        template.check(messages, row.tools)
        rendered = [
            (render(part, options.thinking, tools=row.tools, no_loss=options.no_loss, trained_from=start), part)
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


def add_packing_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide the packs, for this script and repack.py."""
    parser.add_argument("--seq-length", required=True, type=int, help="positions in a pack")
    parser.add_argument("--seed", default=1234, type=int, help="shuffles the documents before they are packed")
    parser.add_argument(
        "--pad-multiple", default=1, type=int, help="every document takes a multiple of this many positions"
    )
    parser.add_argument("--max-docs-per-pack", default=64, type=int, help="most documents in one pack")
    parser.add_argument("--drop-long", action="store_true", help="leave out documents that do not fit a pack")
    parser.add_argument(
        "--order-by", metavar="KEY", help="for a curriculum: order documents by this number of their rows, or by length"
    )
    parser.add_argument("--blocks", default=4, type=int, help="with --order-by: blocks that are packed by themselves")


def packing_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The parsed options as arguments of `build_packs`; raises `UserError` for settings that cannot be."""
    check_settings(args.seq_length, args.pad_multiple, args.max_docs_per_pack, args.seed)
    if args.order_by is not None and not re.fullmatch(r"\w{1,40}", args.order_by):
        raise UserError(f"--order-by {args.order_by!r} must be letters, digits and underscores: it names a folder")
    if args.order_by and args.blocks < 2:
        raise UserError(f"--blocks {args.blocks} must be at least 2")
    return {
        "seq_length": args.seq_length,
        "pad_multiple": args.pad_multiple,
        "max_documents": args.max_docs_per_pack,
        "seed": args.seed,
        "drop_long": args.drop_long,
        "curriculum": Curriculum(args.order_by, args.blocks) if args.order_by else None,
    }


def main() -> int:
    """Checks the arguments, writes the store and prints the summary."""
    parser = argparse.ArgumentParser(
        description="Turn conversations into a token store with a pack index.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input",
        required=True,
        action="append",
        help="JSONL, JSON, CSV or parquet (gzip, zstd), a folder of them, - or hub:NAME@REVISION; repeatable",
    )
    parser.add_argument(
        "--tokenizer", required=True, type=Path, help="pico, or the folder of the model or of its tokenizer"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the token store")
    parser.add_argument(
        "--thinking",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="train on reasoning_content where there is some; --no-thinking leaves it out everywhere",
    )
    parser.add_argument(
        "--split-turns",
        default="auto",
        choices=("auto", "off"),
        help="auto: one document per user message where earlier turns have reasoning; off: these turns have no loss",
    )
    for part, what in zip(PARTS, ("the reasoning", "tool calls"), strict=True):
        name = part.removesuffix("s")
        parser.add_argument(
            f"--no-{name}-loss", action="store_true", help=f"{what} are context only: shown, not trained"
        )
    parser.add_argument("--form", default="auto", help="form of the rows, or a named data set (convert.py --list)")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="a key to leave out of every row; repeatable"
    )
    parser.add_argument(
        "--evaluation-data", action="store_true", help="take rows that are for evaluation only, for a validation store"
    )
    parser.add_argument("--drop-null-arguments", action="store_true", help="leave null arguments out of tool calls")
    add_packing_options(parser)
    args = parser.parse_args()
    packing = packing_arguments(args)
    for source in args.input:
        open_rows(source)  # refuses an input that cannot be read before anything is loaded
    tokenizer_file(args.tokenizer)
    check_output(args.out, KIND)
    no_loss = tuple(part for part, off in zip(PARTS, (args.no_thinking_loss, args.no_tool_loss), strict=True) if off)
    options = Options(
        args.thinking,
        args.split_turns == "auto",
        no_loss,
        args.drop_null_arguments,
        args.order_by,
        form_named(args.form),
        tuple(args.ignore),
        args.evaluation_data,
    )
    store, facts = prepare(args.input, args.tokenizer, args.out, options=options, **packing)
    print_summary(store, facts)
    print_documents(Viewer(store, None), some_rows(len(store)))
    return 0


if __name__ == "__main__":
    run(main)
