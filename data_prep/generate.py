"""Writes questions and answers of a reasoning-gym task, or puzzles, as chat JSONL, free of held-out questions.

    python data_prep/generate.py --task number_sorting --size 500 --seed 1 --out held.jsonl max_numbers=5
    python data_prep/generate.py --task number_sorting --size 9000 --seed 2 --out train.jsonl --exclude held.jsonl \
        max_numbers=5
    python data_prep/generate.py --task challenge/bits --size 1000 --seed 1 --out bits.jsonl level=2
    python data_prep/generate.py --task steps/lists --size 9000 --seed 2 --out traces.jsonl injected=0.5

No question occurs twice in the file, and with `--exclude` none that is, or nearly is, in the named files.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.chat_rows import read_conversations
from data_prep.overlap import HeldOut, distinct_new
from data_prep.puzzles.kinds import KINDS, PREFIX, puzzle_rows
from data_prep.sources.reasoning_gym import reasoning_gym_rows
from data_prep.steps.rows import SOURCE as STEPS_SOURCE
from data_prep.steps.rows import step_rows
from nano3.documents import parse_json
from nano3.rows import write_rows

TRIES = 20
"""Questions drawn for each one wanted before the task counts as exhausted."""


def parse_params(pairs: list[str]) -> dict[str, Any]:
    """`["max_numbers=5", "cipher=rot"]` -> `{"max_numbers": 5, "cipher": "rot"}`: JSON where it is JSON, else text."""
    params: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{pair!r} is not key=value; parameters of the task look like max_numbers=5")
        if key in ("task", "size", "seed"):
            raise UserError(f"{pair!r}: give it as --{key} {value}")
        try:
            params[key] = parse_json(value, Any, pair)
        except UserError:
            params[key] = value
    return params


def fresh_rows(
    task: str, size: int, seed: int, held_out: HeldOut | None = None, **params: Any
) -> Iterator[dict[str, Any]]:
    """`size` rows of a task with distinct questions, none of which matches `held_out`.

    Raises `UserError` when the task runs out of such questions.
    """
    found = 0
    for row in distinct_new(_rows(task, size * TRIES, seed, params), size, held_out):
        found += 1
        yield row
    if found < size:
        raise UserError(
            f"task {task} gave only {found} of {size} distinct new questions in {size * TRIES} draws; "
            "ask for fewer with --size, or widen the task with key=value"
        )


def _rows(task: str, size: int, seed: int, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`size` rows, not necessarily distinct: of a puzzle kind, of step-aware traces, or of reasoning-gym."""
    if task == STEPS_SOURCE:
        if unknown := set(params) - {"steps", "injected"}:
            raise UserError(f"{task} has no parameter {unknown.pop()!r}; it has steps, 2 to 4, and injected, 0 to 1")
        return step_rows(size, seed, **params)
    if not task.startswith(PREFIX):
        return reasoning_gym_rows(task, size, seed, **params)
    if unknown := set(params) - {"level"}:
        raise UserError(f"puzzles have no parameter {unknown.pop()!r}; they have level, from 1 to 3 (numerals from 0)")
    return puzzle_rows(task.removeprefix(PREFIX), size, seed, **params)


def main() -> int:
    """Writes the file and says how many rows it has."""
    parser = argparse.ArgumentParser(
        description="Write questions and answers of a reasoning-gym task, or puzzles, as chat JSONL.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = ", ".join(KINDS)
    parser.add_argument(
        "--task", required=True, help=f"a reasoning-gym task, {STEPS_SOURCE}, or {PREFIX} and one of {names}"
    )
    parser.add_argument("--size", required=True, type=int, help="number of rows")
    parser.add_argument("--seed", default=1, type=int, help="rows are the same for the same task, seed and parameters")
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write, replaced when it exists")
    parser.add_argument("--exclude", action="append", default=[], help="held-out JSONL to stay clear of; repeatable")
    parser.add_argument("params", nargs="*", metavar="key=value", help="parameters of the task")
    args = parser.parse_args()
    if args.size < 1:
        raise UserError(f"--size {args.size} must be at least 1")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; give a file name ending in .jsonl")
    params = parse_params(args.params)
    if any(args.out.resolve() == Path(source).resolve() for source in args.exclude):
        raise UserError(f"--out {args.out} is also in --exclude; write to another file")
    excluded = [read_conversations(source) for source in args.exclude]
    held_out = HeldOut(row for rows in excluded for row in rows) if excluded else None
    rows = fresh_rows(args.task, args.size, args.seed, held_out, **params)
    count = write_rows(args.out, tqdm(rows, total=args.size, unit="row", disable=None))
    clear = f", none of them near the {len(held_out)} questions of {', '.join(args.exclude)}" if held_out else ""
    print(f"{args.out}: {count} distinct questions of {args.task}{clear}")
    return 0


if __name__ == "__main__":
    run(main)
