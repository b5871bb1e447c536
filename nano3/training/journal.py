"""What a run reports: `metrics.jsonl`, and TensorBoard and Weights & Biases as views of it, under the same names.

`metrics.jsonl` is the record: one object a line, in the order of steps. At every start it is cut to the step that the
run goes on from, and each view is built anew from what is left. So a run that was killed after its last checkpoint, and
takes the lost steps again, shows every step once, in every view, as one run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import TypedDict

from nano3.documents import Count, check, parse_json_line

Row = dict[str, Any]


class Metrics(TypedDict):
    """What every row has."""

    step: Count


"""`step`, `time` (seconds since 1970) and numbers by name; a list is a distribution over expert numbers."""

FILE = "metrics.jsonl"


class View(Protocol):
    """Something that shows rows."""

    def open(self) -> None:
        """Starts empty, or where it is after the rows that it already has."""

    def add(self, row: Row) -> None:
        """Shows one row; steps never go back."""

    def close(self) -> None:
        """Everything given is on disk, or sent, when this returns."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, or none; a last line that a killed process left unfinished is no row."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        row = parse_json_line(line, where)
        check(row, Metrics, where, "restore the file, or remove it and the run")  # type: ignore[arg-type]
        rows.append(row)
    return rows


def cut(path: Path, step: int) -> list[Row]:
    """Leaves the rows up to `step` in the file, whole or as it was, and returns them."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    os.replace(aside, path)
    return rows


class Journal:
    """Writes rows to `metrics.jsonl` and shows them in every view.

    Args:
        folder: of the run.
        views: what else shows the rows.
    """

    def __init__(self, folder: Path, views: Sequence[View]) -> None:
        self.path, self.views, self.opened = folder / FILE, views, False

    def open(self, step: int) -> None:
        """Goes on after `step`, 0 at the beginning; what the file says of later steps is forgotten."""
        rows = cut(self.path, step)
        for view in self.views:
            view.open()
            for row in rows:
                view.add(row)
        self.opened = True

    def write(self, row: Row) -> None:
        """Adds one row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for view in self.views:
            view.add(row)

    def close(self) -> None:
        """Closes the views; a second time, or before `open`, there is nothing to close."""
        for view in self.views if self.opened else ():
            view.close()
        self.opened = False
