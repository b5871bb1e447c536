"""Counts training questions that are, or nearly are, held-out questions: `python data_prep/check_overlap.py A B`.

Exit code 0 when there are none, 1 when there are. What counts as near is said in data_prep/overlap.py.
"""

from __future__ import annotations

import argparse

from data_prep.overlap import overlap_of_files
from nano3.cli import run

SHOWN = 10
"""Offending pairs printed; the counts are always complete."""


def main() -> int:
    """Prints the counts and the first offending pairs."""
    parser = argparse.ArgumentParser(description="Are held-out questions, or near duplicates of them, in training?")
    parser.add_argument("training", help="chat JSONL that the model is trained on")
    parser.add_argument("held_out", help="chat JSONL that the model is scored on")
    args = parser.parse_args()
    overlap = overlap_of_files(args.training, args.held_out)
    print(overlap)
    pairs = [("exact", *pair) for pair in overlap.exact] + [("near", *pair) for pair in overlap.near]
    for kind, training, held_out in pairs[:SHOWN]:
        print(f"  {kind}: training {training}, held out {held_out}")
    if len(pairs) > SHOWN:
        print(f"  and {len(pairs) - SHOWN} more")
    return 1 if pairs else 0


if __name__ == "__main__":
    run(main)
