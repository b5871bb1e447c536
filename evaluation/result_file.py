"""A result of evaluation/evaluate.py as a file: what every result holds, and the one way to read and to write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import Name, Positive, Sha256, check, read_json, shown
from nano3.outputs import fresh_file

Result = Mapping[str, Any]

KIND = "evaluation-result"
"""Marks our files: a second run may replace one, and never somebody else's file."""
LARGEST = 512 << 20
"""Bytes of a result: 4,183 questions with 16 answers of 8 KB each."""
_REMEDY = "score the model again with evaluation/evaluate.py"


class Row(TypedDict):
    """What every row of a result has."""

    id: Name
    question: str
    expected: str
    answer: str
    correct: bool
    finished: bool
    outcome: NotRequired[Name]
    letter_correct: NotRequired[bool]
    samples: NotRequired[list[Any]]
    share: NotRequired[Annotated[float, Ge(0), Le(1)]]


class ResultFile(TypedDict):
    """What every result has. The two hashes are those of the model's files (`evaluation.models.identity_of`)."""

    kind: Name
    n: Positive
    answers: list[Row]
    model: Name
    hashes: NotRequired[dict[Name, Any]]
    model_sha256: NotRequired[Sha256]
    adapter_sha256: NotRequired[Sha256]


def read_result(path: Path) -> Result:
    """A result of evaluation/evaluate.py. Raises `UserError` for anything else."""
    found: Any = read_json(path, dict, _REMEDY, LARGEST)
    if found.get("kind") != KIND:
        raise UserError(f"{path} is no result of evaluation/evaluate.py; {_REMEDY}")
    return _checked(found, path)


def results_in(folder: Path) -> dict[Path, Result]:
    """The results among the JSON files of a folder, by path; each file is read once. Raises `UserError` for a result
    that is damaged."""
    found: dict[Path, Result] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content: Any = read_json(path, dict, _REMEDY, LARGEST)
        except UserError:  # another program's file
            continue
        if content.get("kind") == KIND:
            found[path] = _checked(content, path)
    return found


def _checked(content: Any, path: Path) -> Result:
    check(content, ResultFile, str(path), _REMEDY)
    if not content["answers"]:
        raise UserError(f"{path} has no answers; {_REMEDY}")
    ids = [row["id"] for row in content["answers"]]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: the id {shown(next(one for one in ids if ids.count(one) > 1))} twice; {_REMEDY}")
    if any("samples" in row and "share" not in row for row in content["answers"]):
        raise UserError(f"{path}: answers with samples lack the share of right ones; {_REMEDY}")
    return content


def check_result_file(out: Path) -> Path:
    """Refuses a result path that is a folder or another program's file."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file name such as {out / 'result.json'}")
    if out.exists():
        try:
            ours = read_json(out, dict[str, Any], limit=LARGEST).get("kind") == KIND
        except UserError:
            ours = False
        if not ours:
            raise UserError(f"--out {out} exists and is not a result of this script; choose another name or remove it")
    return out


def result_text(result: Result) -> str:
    """The result as its file holds it."""
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def write_result(result: Result, out: Path) -> None:
    """Writes the result whole or not at all."""
    with fresh_file(out) as temporary:
        temporary.write_text(result_text(result))
