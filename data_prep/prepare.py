"""Chat JSONL -> token store with a pack index.

    python data_prep/prepare.py --input train.jsonl --tokenizer MODEL --out runs/data/train --seq-length 4096

Streams: memory does not grow with the data. The store appears whole or not at all. For another sequence length run
data_prep/repack.py, which leaves the tokens as they are; for validation data run this again with another `--out`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.chat import Segment, render, without_reasoning
from data_prep.conversations import Conversation, Conversations
from data_prep.packing import build_packs, check_settings
from data_prep.store import StoreWriter
from data_prep.tokens import ChatTokenizer
from nano3.cli import UserError, check_output, fresh_output, run
from nano3.rows import open_rows
from nano3.token_store import KIND, TokenStore, tokenizer_file

BATCH = 1024
"""Conversations encoded together: enough for the tokenizer's threads, a few megabytes of memory."""


@dataclass
class Turns:
    """Assistant turns by what the loss makes of them."""

    answered: int = 0
    thought: int = 0
    context_only: int = 0

    def count(self, conversation: Conversation, segments: Sequence[Segment]) -> None:
        """Adds the turns of a rendered conversation."""
        before = ["", *(segment.text for segment in segments)]
        supervised = [prompt for prompt, segment in zip(before, segments, strict=False) if segment.supervised]
        thought = sum(prompt.endswith("<think>\n") for prompt in supervised)
        self.thought += thought
        self.answered += len(supervised) - thought
        turns = sum(message["role"] == "assistant" for message in conversation.messages)
        self.context_only += turns - len(supervised)


def prepare(
    inputs: Sequence[Path | str], tokenizer: Path, out: Path, seq_length: int, thinking: bool = True, **packing: Any
) -> tuple[TokenStore, dict[str, Any]]:
    """Writes the token store `out` with its pack index and returns it with the index's facts (`packs.json`).

    `thinking=False` trains answers only: every `reasoning_content` is left out. `packing` are further arguments of
    `data_prep.packing.build_packs`. Raises `UserError`, and leaves `out` as it was, for input that cannot be used.
    """
    opened = [Conversations(source) for source in inputs]
    encoder = ChatTokenizer(tokenizer)
    turns = Turns()
    with fresh_output(out, KIND) as temporary:
        writer = StoreWriter(temporary)
        try:
            for conversations in opened:
                with tqdm(conversations, desc=conversations.name, unit="doc", disable=None) as rows:
                    _add(iter(rows), encoder, writer, turns, thinking)
            writer.finish(
                encoder,
                thinking=thinking,
                turns=vars(turns),
                inputs=[fact for conversations in opened for fact in conversations.facts],
            )
        finally:
            writer.close()
        facts = build_packs(TokenStore(temporary), seq_length, **packing)
    return TokenStore(out), facts


def _add(
    rows: Iterator[Conversation], encoder: ChatTokenizer, writer: StoreWriter, turns: Turns, thinking: bool
) -> None:
    while batch := list(islice(rows, BATCH)):
        documents = [render(row.messages if thinking else without_reasoning(row.messages), thinking) for row in batch]
        for row, segments, (tokens, mask) in zip(batch, documents, encoder.encode(documents), strict=True):
            if not mask.any():
                raise UserError(
                    f"{row.where}: no supervised token, since no assistant message with a weight above 0 follows the "
                    "last user message; add the answer or remove the row"
                )
            if not row.weight:
                raise UserError(f"{row.where}: 'weight' is 0, so there is nothing to learn from it; remove the row")
            turns.count(row, segments)
            try:
                writer.add(tokens, mask * np.float32(row.weight), row.source)
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from error


def print_summary(store: TokenStore, facts: dict[str, Any]) -> None:
    """Prints what is in the store and how full the packs are."""
    manifest = store.manifest
    total, supervised = manifest["tokens"], manifest["supervised_tokens"]
    print(f"{store.folder}: {len(store):,} documents, {total:,} tokens, {supervised:,} supervised", end=" ")
    print(f"({supervised / total:.1%}), longest document {manifest['longest_document']:,} tokens")
    if store.weighted:
        print(f"  loss weights: {', '.join(format(weight, 'g') for weight in sorted(manifest['weights']))}")
    for name, counts in manifest["sources"].items():
        print(f"  {name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens", end=", ")
        print(f"{counts['supervised_tokens']:,} supervised")
    turns = manifest["turns"]
    print(f"  assistant turns: {turns['answered']:,} direct, {turns['thought']:,} with reasoning", end=", ")
    print(f"{turns['context_only']:,} without loss (a later user message removed their reasoning)")
    print_packs(facts)


def print_packs(facts: dict[str, Any]) -> None:
    """Prints one line on a pack index."""
    print(f"  packs of {facts['seq_length']:,}: {facts['packs']:,}, {facts['efficiency']:.2%} full", end=", ")
    print(f"at most {facts['most_documents_in_a_pack']} documents in one", end=", ")
    print(f"{facts['dropped_documents']:,} documents left out as too long")


def add_packing_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide the packs, for this script and repack.py."""
    parser.add_argument("--seq-length", required=True, type=int, help="positions in a pack")
    parser.add_argument("--seed", default=1234, type=int, help="shuffles the documents before they are packed")
    parser.add_argument(
        "--pad-multiple", default=1, type=int, help="every document takes a multiple of this many positions"
    )
    parser.add_argument("--max-docs-per-pack", default=64, type=int, help="most documents in one pack")
    parser.add_argument("--drop-long", action="store_true", help="leave out documents that do not fit a pack")


def packing_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The parsed options as arguments of `build_packs`; raises `UserError` for settings that cannot be."""
    check_settings(args.seq_length, args.pad_multiple, args.max_docs_per_pack)
    return {
        "seq_length": args.seq_length,
        "pad_multiple": args.pad_multiple,
        "max_documents": args.max_docs_per_pack,
        "seed": args.seed,
        "drop_long": args.drop_long,
    }


def main() -> int:
    """Checks the arguments, writes the store and prints the summary."""
    parser = argparse.ArgumentParser(
        description="Turn chat JSONL into a token store with a pack index.",
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
    add_packing_options(parser)
    args = parser.parse_args()
    packing = packing_arguments(args)
    for source in args.input:
        open_rows(source)  # refuses an input that cannot be read before anything is loaded
    tokenizer_file(args.tokenizer)
    check_output(args.out, KIND)
    store, facts = prepare(args.input, args.tokenizer, args.out, thinking=args.thinking, **packing)
    print_summary(store, facts)
    return 0


if __name__ == "__main__":
    run(main)
