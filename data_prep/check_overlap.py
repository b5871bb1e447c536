"""Counts training questions that are, or nearly are, held-out questions: `python data_prep/check_overlap.py A B`.

Exit code 0 when there are none, 1 when there are. `--list pairs.jsonl` writes all of them down; `python
data_prep/clean.py A --out C --exclude B` leaves them out. What counts as near is said in data_prep/overlap.py.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from pathlib import Path

from data_prep.overlap import overlap_of_files
from nano3.rows import write_rows

SHOWN = 10
"""Offending pairs printed; the counts, and the file of --list, are always complete."""


def main() -> int:
    """Prints the counts and the first offending pairs."""
    parser = argparse.ArgumentParser(description="Are held-out questions, or near duplicates of them, in training?")
    parser.add_argument("training", help="rows that the model is trained on")
    parser.add_argument("held_out", help="rows that the model is scored on")
    parser.add_argument("--list", type=Path, metavar="FILE", help="JSONL file for all pairs: kind, training, held_out")
    args = parser.parse_args()
    for name in (args.training, args.held_out):
        if args.list and args.list.exists() and Path(name).exists() and args.list.samefile(name):
            raise UserError(f"--list {args.list} is also read; write to another file")
    overlap = overlap_of_files(args.training, args.held_out)
    print(overlap)
    pairs = [("exact", *pair) for pair in overlap.exact] + [("near", *pair) for pair in overlap.near]
    for kind, training, held_out in pairs[:SHOWN]:
        print(f"  {kind}: training {training}, held out {held_out}")
    if len(pairs) > SHOWN:
        print(f"  and {len(pairs) - SHOWN} more" + ("" if args.list else "; --list FILE writes down all"))
    if args.list:
        named = ("kind", "training", "held_out")
        write_rows(args.list, (dict(zip(named, pair, strict=True)) for pair in pairs))
    return 1 if pairs else 0


if __name__ == "__main__":
    run(main)
