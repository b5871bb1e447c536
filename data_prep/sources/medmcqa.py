"""MedMCQA: 194k questions of Indian medical entrance exams (Pal et al., CHIL 2022), Apache-2.0.

Published as `openlifescienceai/medmcqa` (revision 91c6572c454088bf71b679ad90aa8dffcd0d5868) with `question`, `opa` to
`opd`, `cop`, `exp`, `subject_name`, `topic_name`, `choice_type`, `id`; 182,822 / 4,183 / 6,150 rows, of which the
test split has no answers. There `cop` counts from 0; in the original JSON and its other copies from 1. Which it is is
decided from the file: a 0 says from 0, a 4 says from 1, both or neither is refused. Also
`openlifescienceai/medmcqa_formatted` (`data` with `Question`, `Options`, `Correct Option`, `Correct Answer`;
`subject_name`), and the 300 questions of the package `evals` 3.0.1.post1 (MIT), whose row holds subject, question and
options as one text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.forms.form import Fields, all_keys, chosen, keys, short, text_of
from data_prep.sources.source import Facts, Source, asked_and_ideal, letter_number, number_of
from nano3.cli import UserError
from nano3.rows import Row, open_rows

_OPTIONS = ("opa", "opb", "opc", "opd")
_LOOK_AHEAD = 10_000
"""Rows in memory until `cop` has shown where it counts from; a file that has not by then never will."""
_PLAIN = "question opa opb opc opd cop exp subject_name"
_FORMATTED = "data explanation subject_name"
_EVALS = "input ideal"
_NO_ANSWER = (None, "", -1)
"""What stands in `cop` of the test split, by its copy."""
_TEXT = re.compile(r"Subject: (.+?)\n\n(.+?)\n\s*a\) (.+?)\nb\) (.+?)\nc\) (.+?)\nd\) (.+)", re.DOTALL)


def read(source: Path | str, facts: Facts) -> Iterator[Row]:
    """The rows with `cop` counting from 0, whatever the file does."""
    opened = open_rows(source)
    rows = iter(opened)
    seen: list[Row] = []
    first = None
    for row in rows:
        seen.append(row)
        if "cop" not in row.fields or row.fields["cop"] in _NO_ANSWER:
            break  # another form, or the test split: nothing to decide
        cop = _at(row, 0, 4)
        if cop in (0, 4):
            first = 0 if cop == 0 else 1
            break
        if len(seen) == _LOOK_AHEAD:
            break
    if first is None and "cop" in seen[-1].fields and seen[-1].fields["cop"] not in _NO_ANSWER:
        raise UserError(
            f"{seen[-1].where}: 'cop' was 1, 2 or 3 in all {len(seen)} rows so far, so that nobody can tell whether it "
            "counts from 0 or from 1; give more rows of the file, or the options and the letter with --map"
        )
    for row in chain(seen, rows):
        if first is None or row.fields.get("cop") in _NO_ANSWER:
            yield row
        else:
            yield Row({**row.fields, "cop": _at(row, first, first + 3) - first}, row.where)
    facts += opened.facts


def _at(row: Row, low: int, high: int) -> int:
    try:
        return number_of(row.fields, "cop", low, high)
    except UserError as error:
        raise UserError(f"{row.where}: {error}, as in the rows before it") from error


def chat(fields: Fields) -> dict[str, Any]:
    """One question with its explanation as the reasoning."""
    if "input" in fields:
        return _evals(fields)
    if "data" in fields:
        return _formatted(fields)
    options = [text_of(fields, key) for key in _OPTIONS]
    if fields.get("cop") in _NO_ANSWER:
        raise UserError(f"'cop' is {short(fields.get('cop'))}: no answer, as in the test split; score validation")
    row = chosen(text_of(fields, "question"), options, number_of(fields, "cop", 0, 3), _explanation(fields, "exp"))
    return row | {"subject": text_of(fields, "subject_name")}


def _formatted(fields: Fields) -> dict[str, Any]:
    data = fields["data"]
    options = data.get("Options") if isinstance(data, dict) else None
    if not isinstance(options, dict) or sorted(options) != list("ABCD"):
        raise UserError(f"'data' is {short(data)}; it must have 'Question' and 'Options' with A, B, C and D")
    choices = [text_of(options, letter) for letter in "ABCD"]
    right = letter_number("Correct Option", data.get("Correct Option"), 4)
    if data.get("Correct Answer") not in (None, choices[right]):
        raise UserError(
            f"'Correct Answer' is {short(data['Correct Answer'])}, but option {'ABCD'[right]} says otherwise"
        )
    row = chosen(text_of(data, "Question"), choices, right, _explanation(fields, "explanation"))
    return row | {"subject": text_of(fields, "subject_name")}


def _evals(fields: Fields) -> dict[str, Any]:
    asked, ideal = asked_and_ideal(fields)
    match = _TEXT.fullmatch(asked)
    if not match:
        raise UserError(f"'input' is {short(asked)}; it must be a subject, a question, and options a) to d)")
    subject, question, *choices = match.groups()
    right = letter_number("ideal", ideal[:1], 4)
    if ideal[1:] != f") {choices[right]}":
        raise UserError(f"'ideal' is {short(ideal)}, which is not the text of that option")
    return chosen(question, choices, right) | {"subject": subject, "split": "validation"}


def _explanation(fields: Fields, key: str) -> str:
    return text_of(fields, key, empty=True) if fields.get(key) is not None else ""


SOURCE = Source(
    "medmcqa",
    "MedMCQA, as published, formatted, or in OpenAI's evals",
    all_keys(_PLAIN, _FORMATTED, _EVALS),
    keys("question opa opb opc opd", "data subject_name"),  # without `cop`: the test split is known, and refused
    chat,
    harmless=all_keys("choice_type topic_name"),
    terms="Apache-2.0",
    read=read,
)
