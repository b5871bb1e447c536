"""In which ways answers fail, where, and which ones a tuning fixed and broke. Reads verdicts; judges nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.comparison import NO_SUBJECT
from evaluation.judging.judges import OUTCOMES, RIGHT, WRONG
from evaluation.result_file import Result

Row = Mapping[str, Any]

LENGTHS = ((0, 50), (50, 200), (200, 1000), (1000, None))
"""Characters of a question, by which its answers are grouped."""


def outcome(row: Row) -> str:
    """A row's outcome; of results before format 2, which had none, what can be told from them."""
    if "outcome" in row:
        return str(row["outcome"])
    return RIGHT if row["correct"] else WRONG if row.get("finished", True) else "unfinished"


def outcomes(rows: Sequence[Row]) -> dict[str, int]:
    """How many answers ended in which of `OUTCOMES`."""
    counts = Counter(outcome(row) for row in rows)
    return {name: counts[name] for name in OUTCOMES}


def by_subject(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Outcomes of each subject, or source where no row has a subject; the largest first."""
    key = "subject" if any(row.get("subject") for row in rows) else "source"
    return _grouped(rows, lambda row: str(row.get(key) or NO_SUBJECT))


def by_length(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Outcomes by the length of the question, in characters."""
    names = {low: f"{low:,} to {high:,}" if high else f"{low:,} and more" for low, high in LENGTHS}

    def length(row: Row) -> int:
        return max(low for low, _ in LENGTHS if len(row["question"]) >= low)

    grouped = _grouped(rows, length)
    return {names[low]: grouped[low] for low in names if low in grouped}


def by_form(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Outcomes by the form of the reasoning (`reasoning_form.FORMS`); nothing where no reasoning was asked for."""
    return _grouped(rows, lambda row: row["form"]) if all("form" in row for row in rows) else {}


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, dict[str, int]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {name: outcomes(part) for name, part in sorted(groups.items(), key=lambda item: -len(item[1]))}


def changed(before: Result, after: Result) -> tuple[list[tuple[Row, Row]], list[tuple[Row, Row]]]:
    """Pairs of rows that were fixed (wrong, then right) and broken (right, then wrong), in order."""
    there = {row["id"]: row for row in after["answers"]}
    pairs = [(row, there[row["id"]]) for row in before["answers"]]
    fixed = [(old, new) for old, new in pairs if new["correct"] and not old["correct"]]
    broken = [(old, new) for old, new in pairs if old["correct"] and not new["correct"]]
    return fixed, broken
