"""Two more sets of the package `evals` 3.0.1.post1 (MIT for the package): JEE mathematics and PARARULE-Plus.

* jee-math: 434 multiple-choice questions of the Indian engineering entrance exam, options `(A)` to `(D)`; the terms
  of the questions are not stated: evaluation only.
* PARARULE-Plus (Bao et al., 2022, MIT; `qbao775/PARARULE-Plus` on the hub): 2,000 of its questions of depth 4,
  whether a sentence follows from facts and rules, `true` or `false`.
"""

from __future__ import annotations

import re
from typing import Any

from data_prep.forms.form import Fields, all_keys, chosen, keys, short, turn
from data_prep.sources.mmlu_dev import split_options
from data_prep.sources.source import Source, asked_and_ideal, letter_number
from nano3.cli import UserError

_ANSWER = re.compile(r"\(([A-D])\)")
_PASSAGE = re.compile(r"\s*Passage: (.+?) Question: (.+?)\s*\nAnswer:\s*", re.DOTALL)


def jee(fields: Fields) -> dict[str, Any]:
    """A question of jee-math."""
    asked, ideal = asked_and_ideal(fields)
    match = _ANSWER.search(ideal)
    if not match:
        raise UserError(f"'ideal' is {short(ideal)}; it must name the answer as (A), (B), (C) or (D)")
    try:
        question, choices = split_options(asked)
    except UserError as error:
        raise UserError(f"'input' is not a question with options ({error})") from error
    return chosen(question, choices, letter_number("ideal", match[1], len(choices))) | {"subject": "mathematics"}


def pararule(fields: Fields) -> dict[str, Any]:
    """A question of PARARULE-Plus."""
    asked, ideal = asked_and_ideal(fields)
    match = _PASSAGE.fullmatch(asked)
    if not match:
        raise UserError(f"'input' is {short(asked)}; it must be a passage and a question")
    if ideal not in ("true", "false"):
        raise UserError(f"'ideal' is {short(ideal)}; it must be true or false")
    question = f"{match[1].strip()}\n\nDoes it follow: {match[2].strip()}\nAnswer true or false."
    kind = re.match(r"\w+", str(fields.get("id_string", "")))
    row = {
        "messages": [turn("user", question), turn("assistant", ideal)],
        "answer": ideal,
        "choices": ["true", "false"],
    }
    return row | ({"id": str(fields["id_string"]), "subject": kind[0]} if kind else {})


JEE = Source(
    "jee-math",
    "JEE mathematics of OpenAI's evals",
    all_keys("input ideal"),
    keys(),
    jee,
    terms="not stated: evaluation",
    evaluation_only=True,
)
PARARULE = Source(
    "pararule",
    "PARARULE-Plus of OpenAI's evals",
    all_keys("input ideal id_string"),
    keys(),
    pararule,
    terms="MIT",
)
