"""The parts of a store that is not joined yet: which are finished, for whoever writes, joins or waits for them.

A part lies in the store's unfinished folder (`nano3.token_store.unfinished_folder`). It has its name once it is whole,
and its marker, part.json, says whether the input ends with it.
"""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from nano3.documents import read_json
from nano3.token_store import part_name

MARKER = "part.json"
PREPARE_AGAIN = "remove the folder and prepare again"
"""The remedy for a marker that cannot be read."""


class EndOfInput(TypedDict):
    """What every reader of part.json needs."""

    last: bool


def finished_parts(folder: Path) -> list[int]:
    """The numbers of the finished parts in an unfinished folder, ascending; none where there is no folder."""
    names = [path.name for path in folder.glob("part-*")]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def shards_of(folder: Path) -> int | None:
    """How many shards the input has; None as long as the part that ends it is not there.

    Raises `UserError` for a marker that cannot be read.
    """
    there = finished_parts(folder)
    if not there or not read_json(folder / part_name(there[-1]) / MARKER, EndOfInput, PREPARE_AGAIN)["last"]:
        return None
    return there[-1] + 1
