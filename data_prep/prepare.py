"""Conversations -> token store with a pack index.

    python data_prep/prepare.py --input train.jsonl --tokenizer MODEL --out runs/data/train --seq-length 4096

Streams: memory does not grow with the data. The store appears whole or not at all; a killed run resumes when the same
command is given again. For another sequence length run data_prep/repack.py, which leaves the tokens as they are; for
validation data run this again with another `--out`.

On one machine add `--workers 8`. On several give each the same command with `--shard 1/4` to `--shard 4/4`, and when
all have ended once with `--join`. The bytes are the same in every way.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import check_output, only_writer
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.chat import PARTS
from data_prep.chat_rows import form_named
from data_prep.documents import Options
from data_prep.job import SHARD_ROWS, Job
from data_prep.join import join
from data_prep.packing import build_packs, check_settings
from data_prep.part_folder import Work
from data_prep.shards import write_parts
from data_prep.store_view import Viewer
from data_prep.summary import print_summary
from data_prep.tokens import BACKENDS, TOKENIZERS
from data_prep.xray import print_documents, some_rows
from nano3.file_system import locked
from nano3.pack_index import Curriculum
from nano3.rows import open_rows
from nano3.token_store import KIND, TokenStore, tokenizer_file


def prepare(
    inputs: Sequence[Path | str],
    tokenizer: Path,
    out: Path,
    seq_length: int,
    options: Options | None = None,
    workers: int = 1,
    shard_rows: int = SHARD_ROWS,
    **packing: Any,
) -> tuple[TokenStore, dict[str, Any]]:
    """Writes the token store `out` with its pack index and returns it with the index's facts (`packs.json`).

    `packing` are further arguments of `data_prep.packing.build_packs`. Raises `UserError`, and leaves `out` as it was,
    for input that cannot be used; where only the packs cannot be made, the store stays without them. After a kill the
    same call resumes from the parts that are finished; so it does after Ctrl-C and after errors of the machine.
    """
    return prepare_job(
        Job.of(inputs, tokenizer, options or Options(), shard_rows), out, workers, seq_length=seq_length, **packing
    )


def prepare_job(job: Job, out: Path, workers: int, **packing: Any) -> tuple[TokenStore, dict[str, Any]]:
    """`prepare` for arguments that are a job already."""
    _check_again(job, workers > 1, "--workers")
    work = Work(check_output(out, KIND))
    with only_writer(work.out):
        work.begin(job)
        try:
            write_parts(job, work, workers)
            return join(work, **packing)
        except UserError:
            with suppress(UserError):
                work.remove()
            raise
        except (KeyboardInterrupt, OSError):
            print(f"finished parts stay in {work.folder}: the same command resumes from them", file=sys.stderr)
            raise


def prepare_shards(job: Job, out: Path, element: int, elements: int, workers: int = 1) -> Work:
    """Writes the parts of one of several elements, 1 to `elements`, each of which takes every so-manieth shard.

    Other elements may write theirs at the same time, on this host or others. Parts that are there are not written
    again. `join_shards` makes the store of them.
    """
    _check_again(job, True, "--shard")
    work = Work(check_output(out, KIND))
    work.make()
    with locked(work.folder / f".shard-{element}-of-{elements}.lock", remove=True) as mine:
        if not mine:
            raise UserError(f"another process is writing --shard {element}/{elements} of {out}; wait for it")
        work.share(job)
        write_parts(job, work, workers, element - 1, elements)
    return work


def join_shards(out: Path, job: Job | None, **packing: Any) -> tuple[TokenStore, dict[str, Any]]:
    """Makes the store of all parts that `prepare_shards` wrote, with its packs. They must be of `job` where it is
    given. Killed while the joined parts go, it is the store that is there."""
    work = Work(check_output(out, KIND))
    with only_writer(work.out):
        if work.was_joined(job):
            print(f"{out} is joined already", file=sys.stderr)
            store = TokenStore(work.out)
            facts = build_packs(store, **packing)
            work.clear_joined()
            return store, facts
        if work.job() is None:
            raise UserError(
                f"{out} has no parts to join (no {work.folder}). If a join of it has just ended, there is nothing left "
                "to do; else write them with --shard 1/N to N/N"
            )
        work.make()
        if job is not None:
            work.share(job)
        return join(work, **packing)


def _check_again(job: Job, needed: bool, option: str) -> None:
    if needed and not job.reads_again:
        raise UserError(
            f"{option} reads the input in every process, which standard input and a hub do not allow; write its "
            "rows to a file first, with data_prep/convert.py"
        )


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn conversations into a token store with a pack index.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        help="JSONL, JSON, CSV or parquet (gzip, zstd), a folder of them, - or hub:NAME@REVISION; repeatable",
    )
    parser.add_argument("--tokenizer", type=Path, help="pico, or the folder of the model or of its tokenizer")
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
    parser.add_argument(
        "--backend", default=TOKENIZERS, choices=BACKENDS, help="what encodes; gigatoken is compared with tokenizers"
    )
    parser.add_argument("--drop-null-arguments", action="store_true", help="leave null arguments out of tool calls")
    _add_sharing_options(parser)
    add_packing_options(parser)
    return parser


def _add_sharing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", default=1, type=int, help="processes, each with a core and 300 MB of its own")
    parser.add_argument(
        "--shard-rows", default=SHARD_ROWS, type=int, help="rows that a kill costs a process; they decide the bytes"
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--shard", metavar="I/N", help="write only every N-th shard, from the I-th on, and no store")
    some.add_argument("--join", action="store_true", help="make the store of the shards that --shard wrote")


def _element(text: str) -> tuple[int, int]:
    """The numbers of `--shard I/N`."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text} must be I/N with I from 1 to N, such as 1/4 to 4/4")
    return int(match[1]), int(match[2])


def _job(args: argparse.Namespace) -> Job:
    """The arguments that decide the parts. Raises `UserError` before anything is loaded."""
    if not args.input or not args.tokenizer:
        raise UserError("give --input and --tokenizer")
    for name, value in (("--workers", args.workers), ("--shard-rows", args.shard_rows)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    for source in args.input:
        open_rows(source)
    tokenizer_file(args.tokenizer)
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
        args.backend,
    )
    return Job.of(args.input, args.tokenizer, options, args.shard_rows)


def main() -> int:
    """Checks the arguments, writes the store and prints the summary; or a part of the work, with --shard and --join."""
    args = _parser().parse_args()
    packing = packing_arguments(args)
    if args.join:
        same = _job(args) if args.input or args.tokenizer else None
        store, facts = join_shards(args.out, same, **packing)
    else:
        job = _job(args)
        check_output(args.out, KIND)
        if args.shard:
            element, elements = _element(args.shard)
            work = prepare_shards(job, args.out, element, elements, args.workers)
            print(f"{work.folder}: {len(work.parts())} shards are there; when all elements ended: the same with --join")
            return 0
        store, facts = prepare_job(job, args.out, args.workers, **packing)
    print_summary(store, facts)
    print_documents(Viewer(store, None), some_rows(len(store)))
    return 0


if __name__ == "__main__":
    run(main)
