"""LogiQA and ReClor: passages with a question of logic and four options. Evaluation and tests only.

* LogiQA 1 (Liu et al., IJCAI 2020), `lucasmccabe/logiqa`: `context`, `query`, `options`, `correct_option` from 0;
  7,376 / 651 / 651 rows. For non-commercial research.
* LogiQA 2 (Liu et al., 2023), `datatune/LogiQA2.0` and the authors' repository: `id`, `answer` from 0, `text`,
  `question`, `options`, `type`; 12,567 / 1,569 / 1,572 rows. CC BY-NC-SA 4.0.
* ReClor (Yu et al., ICLR 2020), by request from its authors: `context`, `question`, `answers`, `label` from 0,
  `id_string`; 4,638 / 500 / 1,000 rows, the test split without labels. For non-commercial research.
* All three in the package `evals` 3.0.1.post1 (MIT for the package): passage, question and options as one text, in the
  files named `...-plus` with one option replaced by "None of the other options are correct.".

No revision is pinned: the hub's copies are made by others; convert.py records the one that you name.
"""

from __future__ import annotations

import re
from typing import Any

from data_prep.forms.form import Fields, all_keys, chosen, keys, short, text_of, turn
from data_prep.sources.source import Source, asked_and_ideal, letter_number, list_of, number_of
from nano3.cli import UserError

_TEXT = re.compile(
    r"\s*Passage: (.+?)\s*Question: ?(.*?)\s*\nA\. (.+?)\nB\. (.+?)\nC\. (.+?)\nD\. (.+?)\s*\nAnswer:\s*", re.S
)


def _evals(fields: Fields) -> dict[str, Any]:
    """A row of the package: its messages stay as they are, with the ideal answer as the last."""
    asked, ideal = asked_and_ideal(fields)
    match = _TEXT.fullmatch(asked)
    if not match:
        raise UserError(f"'input' is {short(asked)}; it must be a passage, a question, and options A to D")
    choices = [choice.strip() for choice in match.groups()[2:]]
    if all(choice.startswith(f"{letter}.") for choice, letter in zip(choices, "ABCD", strict=True)):
        choices = [choice[2:].strip() for choice in choices]  # the older file writes the letter twice
    letter = "ABCD"[letter_number("ideal", ideal, 4)]
    row = {"messages": [*fields["input"], turn("assistant", letter)], "answer": letter, "choices": choices}
    return row | ({"id": str(fields["id_string"])} if fields.get("id_string") is not None else {})


def logiqa(fields: Fields) -> dict[str, Any]:
    """A row of LogiQA 1."""
    if "input" in fields:
        return _evals(fields)
    options = list_of(fields, "options", 4, 4)
    right = number_of(fields, "correct_option", 0, 3)
    return chosen(text_of(fields, "query"), options, right, context=text_of(fields, "context"))


def logiqa2(fields: Fields) -> dict[str, Any]:
    """A row of LogiQA 2; its `type`, an object of true and false, gives the subject."""
    if "input" in fields:
        return _evals(fields)
    options = list_of(fields, "options", 4, 4)
    row = chosen(
        text_of(fields, "question"), options, number_of(fields, "answer", 0, 3), context=text_of(fields, "text")
    )
    kinds = fields.get("type") or {}
    if not isinstance(kinds, dict):
        raise UserError(f"'type' is {short(kinds)}; it must be an object of kinds of reasoning")
    named = [kind for kind, holds in kinds.items() if holds]
    return row | {"id": str(fields["id"])} | ({"subject": ", ".join(named)} if named else {})


def reclor(fields: Fields) -> dict[str, Any]:
    """A row of ReClor."""
    if "input" in fields:
        return _evals(fields)
    if "label" not in fields:
        raise UserError("'label' is missing, as in the test split; score the validation split")
    options = list_of(fields, "answers", 4, 4)
    row = chosen(
        text_of(fields, "question"), options, number_of(fields, "label", 0, 3), context=text_of(fields, "context")
    )
    return row | {"id": text_of(fields, "id_string")}


LOGIQA = Source(
    "logiqa",
    "LogiQA 1",
    all_keys("context query options correct_option", "input ideal id_string"),
    keys("context query options correct_option"),
    logiqa,
    terms="non-commercial research",
    evaluation_only=True,
)
LOGIQA2 = Source(
    "logiqa2",
    "LogiQA 2",
    all_keys("id answer text question options type", "input ideal id_string"),
    keys("id answer text question options type"),
    logiqa2,
    harmless=all_keys("type_name"),
    terms="CC BY-NC-SA 4.0, non-commercial",
    evaluation_only=True,
)
RECLOR = Source(
    "reclor",
    "ReClor",
    all_keys("context question answers label id_string", "input ideal"),
    keys("context question answers id_string"),
    reclor,
    terms="non-commercial research",
    evaluation_only=True,
)
