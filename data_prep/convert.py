"""Any of the field's data sets -> chat JSONL, which prepare.py, evaluate.py and the overlap tools read.

    python data_prep/convert.py alpaca.parquet --out my.jsonl --held-out 500
    python data_prep/convert.py table.csv --out my.jsonl --map user="{question} A. {opa}" --map assistant="{answer}"
    python data_prep/convert.py "hub:openai/gsm8k@main?config=main" --form gsm8k --out gsm8k.jsonl
    python data_prep/convert.py --list

The form of the rows is guessed from the first row's keys, and the guess is printed with its reason. Streams: memory
does not grow with the input. Beside `my.jsonl` stands `my.jsonl.about.json`: what was read, as which form, what was
left out and why.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import fresh_files
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import hashlib
import heapq
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data_prep.chat_rows import KNOWN, ChatRows, form_named
from data_prep.drops import Drops
from data_prep.forms.mapping import mapped_form
from data_prep.forms.said import SAY
from data_prep.overlap import HeldOut, compared_text, normalized
from data_prep.sources.source import Source
from nano3.conversations import Conversation, conversation
from nano3.rows import Row, about_file, put_about, put_rows


def convert(rows: ChatRows, out: Path, held_out: int = 0) -> dict[str, Any]:
    """Writes `out` and, with `held_out`, that many of its questions to `held_out_file(out)` instead.

    Which questions are held out depends on their text alone: those with the smallest hashes. Of the others, those that
    are, or nearly are, held-out ones are dropped. Every row is checked as preparation will check it. `UserError` names
    the first that cannot be used, and nothing is written then.

    Returns what is written to `about_file(out)` too: inputs, form, rows, drops with reasons, keys that were not used.
    """
    beside = held_out_file(out)
    held: list[Row] = []
    if not held_out and beside.exists():
        raise UserError(
            f"{beside} is there: without --held-out its questions would be in {out} too. Give --held-out, another "
            "--out, or remove the file"
        )
    with fresh_files(out, about_file(out), *([beside] if held_out else [])) as (temporary, about_it, *held_file):
        if held_out:
            held, count = _held_and_rest(rows, held_out, temporary)
            put_rows(held_file[0], (row.fields for row in held))
        else:
            count = put_rows(temporary, (row.fields for row, _ in _checked(rows)))
        about = _about(rows, count, len(held))
        put_about(about_it, about)
    return about


def _held_and_rest(rows: ChatRows, held_out: int, target: Path) -> tuple[list[Row], int]:
    """Writes to `target` what is clear of the held-out rows; returns these, and how many it wrote."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=target.parent) as scratch:
        chosen, count = _write_and_choose(scratch, rows, held_out)
        if count < 2 * held_out:
            raise UserError(f"--held-out {held_out} of {count} rows leaves fewer to train on; ask for fewer")
        held = [row for number, row, _ in _numbered(scratch) if number in chosen]
        lines = tqdm(_numbered(scratch), desc="held-out questions", total=count, unit="row", disable=None)
        rest = ((row, compared) for number, row, compared in lines if number not in chosen)
        return held, put_rows(target, (row.fields for row in _clear_of(held, rest, rows)))


def held_out_file(out: Path) -> Path:
    """`my.jsonl` -> `my.held-out.jsonl`."""
    return out.with_name(f"{out.stem}.held-out{out.suffix}")


def _checked(rows: ChatRows) -> Iterator[tuple[Row, Conversation]]:
    """The chat rows, and what preparation will make of each."""
    for row in tqdm(rows, desc=rows.name, unit="row", disable=None):
        yield row, conversation(row.fields, row.where, rows.name)


def _write_and_choose(scratch: IO[str], rows: ChatRows, held_out: int) -> tuple[set[int], int]:
    """Writes all rows with their places and what of them is compared; returns the numbers of those to hold out, and
    how many rows there are."""
    smallest: list[tuple[int, int]] = []  # (-hash, number), the largest hash first
    hashes: set[int] = set()
    count = 0
    for number, (row, read) in enumerate(_checked(rows)):
        count = number + 1
        scratch.write(json.dumps([row.fields, row.where, normalized(compared_text(read))], ensure_ascii=False) + "\n")
        value = int.from_bytes(hashlib.blake2b(read.question.encode(), digest_size=8).digest())
        if value not in hashes and (len(smallest) < held_out or value < -smallest[0][0]):
            hashes.add(value)
            heapq.heappush(smallest, (-value, number))
            if len(smallest) > held_out:
                hashes.discard(-heapq.heappop(smallest)[0])
    return {number for _, number in smallest}, count


def _numbered(scratch: IO[str]) -> Iterator[tuple[int, Row, str]]:
    """What `_write_and_choose` wrote, from the start: number, row, the text that is compared."""
    scratch.seek(0)
    for number, line in enumerate(scratch):
        fields, where, compared = json.loads(line)
        yield number, Row(fields, where), compared


def _clear_of(held: list[Row], rest: Iterable[tuple[Row, str]], rows: ChatRows) -> Iterator[Row]:
    """The rows whose questions no held-out question resembles."""
    questions = HeldOut(conversation(row.fields, row.where, rows.name) for row in held)
    for row, compared in rest:
        match = questions.match_normalized(compared)
        if match:
            question = conversation(row.fields, row.where, rows.name).question
            rows.drops.add(f"{match[0]} duplicate of a held-out question", row.where, question)
        else:
            yield row


def _about(rows: ChatRows, count: int, held: int) -> dict[str, Any]:
    assert rows.form is not None, "rows were read"
    about = {"inputs": rows.facts, "form": rows.form.name, "reason": rows.reason, "rows": count, "held_out": held}
    if isinstance(rows.form, Source):
        about |= {"terms": rows.form.terms, "evaluation_only": rows.evaluation_rows}
    return about | {"drops": rows.drops.facts(), "unused_keys": dict(rows.unused.most_common())}


def print_about(about: dict[str, Any], out: Path, drops: Drops) -> None:
    """What was written, and what was not."""
    print(f"{out}: {about['rows']:,} rows of the form {about['form']} ({about['reason']})")
    if about["held_out"]:
        print(f"{held_out_file(out)}: {about['held_out']:,} rows, none of them near one of the others")
    if "terms" in about:
        print(
            f"  terms: {about['terms']}"
            + (f"; {about['evaluation_only']:,} rows are for evaluation only" if about["evaluation_only"] else "")
        )
    if about["unused_keys"]:
        keys = ", ".join(f"{key} ({count:,})" for key, count in about["unused_keys"].items())
        print(f"  not used, since they change neither prompt nor loss: {keys}")
    print("\n".join(drops.lines()) or "  left out: nothing")


def print_forms() -> None:
    """All forms, and the terms of the named data sets."""
    for form in KNOWN:
        terms = (
            f" [{form.terms}{'; evaluation only' if form.evaluation_only else ''}]" if isinstance(form, Source) else ""
        )
        print(f"{form.name:18} {form.about}{terms}")


def main() -> int:
    """Checks the arguments, writes the file and says what is in it."""
    parser = argparse.ArgumentParser(
        description="Turn a data set into chat JSONL.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "input",
        nargs="?",
        help="JSONL, a JSON array, CSV or parquet (gzip, zstd), a folder of them, - or hub:NAME@REVISION",
    )
    parser.add_argument("--out", type=Path, help="JSONL file to write, replaced when it exists")
    parser.add_argument("--form", default="auto", help="form of the rows, or a named data set; --list shows all")
    parser.add_argument(
        "--map", action="append", default=[], metavar="PART=TEXT", help="write the form: user='{question}'; repeatable"
    )
    parser.add_argument("--held-out", default=0, type=int, metavar="N", help="questions to keep for evaluation")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="a key to leave out of every row; repeatable"
    )
    ways = "; ".join(f"{name}: {says}" for name, says in SAY.items())
    parser.add_argument("--say", choices=SAY, help=f"of multiple-choice rows, what the model learns to say ({ways})")
    parser.add_argument("--list", action="store_true", help="show all forms and named data sets")
    args = parser.parse_args()
    if args.list:
        print_forms()
        return 0
    if not args.input or not args.out:
        raise UserError("give an input and --out FILE.jsonl (or --list)")
    if args.map and args.form != "auto":
        raise UserError(f"--map and --form {args.form} both say what a row means; give one of them")
    if args.held_out < 0:
        raise UserError(f"--held-out {args.held_out} must be at least 0")
    if args.out.is_dir() or args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out} must be a file name ending in .jsonl")
    if args.out.exists() and Path(args.input).exists() and args.out.samefile(args.input):
        raise UserError(f"--out {args.out} is the input; write to another file")
    form = mapped_form(args.map) if args.map else form_named(args.form)
    rows = ChatRows(args.input, form, args.ignore, args.say or "")
    print_about(convert(rows, args.out, args.held_out), args.out, rows.drops)
    return 0


if __name__ == "__main__":
    run(main)
