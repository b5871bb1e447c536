"""CHAMP: 270 competition problems with their steps (Mao et al., ACL Findings 2024), MIT.

Package champ-dataset 1.0.0, `dataset_files/v0.json`: one object with `problems`, each with `_text`, `category`,
`_answer` and `solution`, whose `steps` each have `_text`; the answers of models that the file holds too are not read.
A benchmark: evaluation only. The steps become the reasoning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.forms.form import Fields, all_keys, keys, short, text_of
from data_prep.sources.source import Facts, Source, worked
from nano3.cli import UserError
from nano3.documents import read_bytes
from nano3.rows import Row

_LARGEST = 128 << 20
"""Bytes of the file, which has 73 million."""


def read(source: Path | str, facts: Facts) -> Iterator[Row]:
    """One row a problem."""
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no such file: {path}; give dataset_files/v0.json")
    data = read_bytes(path, "download it again", _LARGEST)
    problems = _problems(data, str(path))
    if not isinstance(problems, dict):
        raise UserError(f"{path}: 'problems' is {short(problems)}; it must be an object of problems")
    for number, (name, problem) in enumerate(problems.items(), 1):
        if not isinstance(problem, dict):
            raise UserError(f"{path}: {name} is {short(problem)}; it must be an object")
        yield Row(problem, f"{path}:{number}")
    facts.append({"name": path.name, "sha256": hashlib.sha256(data).hexdigest()})


def _problems(data: bytes, where: str) -> Any:
    """`problems` of the file. Its models' answers make it larger than what nano3.documents reads."""
    try:
        return json.loads(data.decode("utf-8-sig"))["problems"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise UserError(
            f"{where}: no JSON object with 'problems' ({type(error).__name__}); download it again"
        ) from error


def chat(fields: Fields) -> dict[str, Any]:
    """One problem with its steps as the reasoning."""
    solution = fields.get("solution")
    steps = solution.get("steps") if isinstance(solution, dict) else None
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise UserError(f"'solution' is {short(solution)}; it must have a list of 'steps'")
    thought = "\n".join(text_of(step, "_text") for step in steps)
    row = worked(text_of(fields, "_text"), text_of(fields, "_answer"), thought)
    return row | {"id": text_of(fields, "identifier"), "subject": text_of(fields, "category"), "split": "test"}


SOURCE = Source(
    "champ",
    "CHAMP, steps as reasoning",
    all_keys("identifier _text category solution _answer"),
    keys(),
    chat,
    harmless=all_keys("_raw_text _raw_answer ch_list fws_annotations conversations"),
    terms="MIT; a benchmark",
    evaluation_only=True,
    read=read,
)
