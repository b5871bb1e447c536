"""Takes out of training data what should not be trained on, and says of every row why.

    python data_prep/clean.py train.jsonl --out clean.jsonl --exclude held.jsonl --exclude reclor.jsonl
    python data_prep/clean.py train.jsonl --out clean.jsonl --near 0.9 --max-words 4000

Dropped are exact and near duplicates of rows before, questions of the files in `--exclude` (as check_overlap.py finds
them), questions with two different answers, answers that repeat themselves, and rows outside the lengths asked for.
Each reason is printed with its count and three examples, and stands in `clean.jsonl.about.json`.
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
import json
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data_prep.chat_rows import ChatRows, form_named, read_conversations
from data_prep.overlap import HeldOut
from data_prep.quality import Candidate, Consistency, Limits, Templates, kept, reason_alone
from nano3.conversations import conversation
from nano3.rows import about_file, put_about, put_rows


def clean(rows: ChatRows, out: Path, limits: Limits, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Writes the rows that stay to `out`, in their order, and returns what is written to `about_file(out)` too.

    Memory grows with the number of rows only: some 200 bytes each and the signatures.
    """
    held_out = [(Path(name).name, HeldOut(read_conversations(name))) for name in exclude]
    templates, answers, places, drops = Templates(), Consistency(), array("q"), rows.drops
    with (
        fresh_files(out, about_file(out)) as (temporary, beside),
        tempfile.TemporaryFile("w+", encoding="utf-8", dir=temporary.parent) as scratch,
    ):
        # What a row says by itself, and what all of them say together.
        for row in tqdm(rows, desc=rows.name, unit="row", disable=None):
            one = Candidate.of(conversation(row.fields, row.where, rows.name))
            reason = reason_alone(one, limits, held_out)
            if reason:
                drops.add(reason, row.where, one.row.question)
                continue
            templates.read(one)
            answers.read(one)
            places.append(scratch.tell())
            scratch.write(one.stored(row.fields))
        # What a row is beside those before it.
        bar = tqdm(places, desc="duplicates", unit="row", disable=None)
        stays = kept(scratch, bar, limits, templates, answers, drops)
        count = put_rows(temporary, (_stored(scratch, place) for place in stays))
        if not count:
            raise UserError(f"nothing is left of {rows.name}:\n" + "\n".join(drops.lines()))
        about = {"inputs": rows.facts, "rows": count, "limits": vars(limits), "drops": drops.facts()}
        put_about(beside, about)
    return about


def _stored(scratch: IO[str], place: int) -> dict[str, Any]:
    """The row that was written at a place."""
    scratch.seek(place)
    return dict(json.loads(scratch.readline())[0])


def main() -> int:
    """Checks the arguments, writes the file and says what was dropped."""
    parser = argparse.ArgumentParser(
        description="Drop duplicates, contamination and damage from training data; every drop has a reason.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("input", help="training rows: a file, a folder, - or hub:NAME@REVISION")
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write, replaced when it exists")
    parser.add_argument("--form", default="auto", help="form of the rows, as in convert.py")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="FILE", help="held-out questions to stay clear of; repeatable"
    )
    parser.add_argument(
        "--near", default=Limits.near, type=float, help="Jaccard index of near duplicates; 2: keep them"
    )
    parser.add_argument("--min-words", default=0, type=int, help="fewest words of a conversation")
    parser.add_argument("--max-words", default=None, type=int, help="most words of a conversation")
    parser.add_argument(
        "--max-repetition", default=Limits.repetition, type=float, help="share of an answer that may repeat"
    )
    parser.add_argument("--keep-contradictions", action="store_true", help="keep questions with two answers")
    args = parser.parse_args()
    if args.near <= 0 or not 0 <= args.max_repetition <= 1:
        raise UserError(f"--near {args.near} must be above 0, and --max-repetition {args.max_repetition} from 0 to 1")
    if args.out.suffix != ".jsonl" or args.out.is_dir():
        raise UserError(f"--out {args.out} must be a file name ending in .jsonl")
    for name in (args.input, *args.exclude):
        if args.out.exists() and Path(name).exists() and args.out.samefile(name):
            raise UserError(f"--out {args.out} is also read; write to another file")
    limits = Limits(args.near, args.min_words, args.max_words, args.max_repetition, not args.keep_contradictions)
    rows = ChatRows(args.input, form_named(args.form))
    about = clean(rows, args.out, limits, args.exclude)
    print(f"{args.out}: {about['rows']:,} rows stay, {rows.drops.total:,} left out")
    print("\n".join(rows.drops.lines()))
    return 0


if __name__ == "__main__":
    run(main)
