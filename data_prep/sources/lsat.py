"""AGIEval's LSAT sections: analytical reasoning (ar), logical reasoning (lr), reading comprehension (rc).

Zhong et al., 2023 (the repository is MIT, the questions are LSAC's): evaluation only. Published as
`dmayhem93/agieval-lsat-{ar,lr,rc}` and `hails/...` with `query` (passage, question and options as one prompt),
`choices` and `gold`, a list with the one right number from 0; 230 / 510 / 269 rows, one split. In the authors'
repository (`lsat-ar.jsonl`) `passage`, `question`, `options`, `label` a letter, `answer` and `other` null. Options
begin with `(A)`. The section is the subject, from the file's or the data set's name. No revision is pinned: the hub's
copies are made by others; convert.py records the one that you name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.forms.form import Fields, all_keys, chosen, keys, short, text_of
from data_prep.sources.source import Facts, Source, letter_number, list_of, number_of
from nano3.cli import UserError
from nano3.rows import Row, open_rows

_QUERY = re.compile(r"(.*?)\s*(?:Q:\s*(.+?))?\s*Answer Choices:.*", re.DOTALL)
_MARK = re.compile(r"\(?([A-E])\)\s*")
_SECTION = re.compile(r"lsat[-_](ar|lr|rc)(?![a-z])")


def read(source: Path | str, facts: Facts) -> Iterator[Row]:
    """The rows with the section that the name speaks of."""
    found = _SECTION.findall(str(source).lower())
    rows = open_rows(source)
    for row in rows:
        yield Row({**row.fields, "section": found[-1]}, row.where) if found else row
    facts += rows.facts


def chat(fields: Fields) -> dict[str, Any]:
    """One question with its passage."""
    choices = list_of(fields, "choices" if "choices" in fields else "options", 2, 5)
    for place, choice in enumerate(choices):
        mark = _MARK.match(choice)
        if mark and mark[1] != "ABCDE"[place]:
            raise UserError(f"option {place} is {short(choice)}, which begins with another option's letter")
    choices = [_MARK.sub("", choice, count=1) for choice in choices]
    if "query" in fields:
        match = _QUERY.fullmatch(text_of(fields, "query"))
        if not match:
            raise UserError(f"'query' is {short(fields['query'])}; it must hold 'Answer Choices:'")
        passage, question = (match[1], match[2]) if match[2] else ("", match[1])
        gold = fields.get("gold")
        if not isinstance(gold, list) or len(gold) != 1:
            raise UserError(f"'gold' is {short(gold)}; it must be a list with the one right number")
        right = number_of({"gold": gold[0]}, "gold", 0, len(choices) - 1)
    else:
        passage, question = text_of(fields, "passage", empty=True), text_of(fields, "question")
        right = letter_number("label", fields.get("label"), len(choices))
    row = chosen(question, choices, right, context=passage)
    return row | ({"subject": fields["section"]} if "section" in fields else {})


SOURCE = Source(
    "lsat",
    "AGIEval's LSAT sections ar, lr and rc",
    all_keys("query choices gold", "passage question options label section"),
    keys("query choices gold", "passage question options label"),
    chat,
    harmless=all_keys("answer other"),
    terms="MIT for the repository, the questions are LSAC's: evaluation",
    evaluation_only=True,
    read=read,
)
