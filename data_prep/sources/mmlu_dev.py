"""MMLU's dev questions with the rationales of Flan (Hendrycks et al., ICLR 2021; Chung et al., 2022), MIT.

The package lm-eval 0.4.13 (MIT) has them in `tasks/mmlu/flan_cot_fewshot/_cot_prompts.json`: one object, subject ->
prompt of up to five questions `Q: ... (A) ... (B) ...` with `A: Let's think step by step. ... The answer is (X).`;
282 questions of 57 subjects. One stands there twice. They are the few-shot examples of MMLU: evaluation only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.forms.form import Fields, all_keys, chosen, keys, short, text_of
from data_prep.sources.source import Facts, Source, letter_number
from nano3.cli import UserError
from nano3.rows import Row, open_rows

_QUESTION = re.compile(r"(.+?)\s*\nA: Let's think step by step\.\s*(.*?)\s*The answer is \(([A-E])\)\.?\s*", re.DOTALL)
_OPTION = re.compile(r"\s\(([A-E])\)(?: |(?=\n))")


def read(source: Path | str, facts: Facts) -> Iterator[Row]:
    """One row a question: `subject` and `text`."""
    rows, count = open_rows(source), 0
    for row in rows:
        for subject, prompt in row.fields.items():
            if not isinstance(prompt, str) or "\n\nQ: " not in prompt:
                raise UserError(
                    f"{row.where}: {subject!r} is {short(prompt)}; it must be a prompt with questions 'Q: ...'"
                )
            for number, text in enumerate(prompt.split("\n\nQ: ")[1:]):
                count += 1
                yield Row({"subject": subject, "number": number, "text": text}, f"{source}:{count}")
    facts += rows.facts


def chat(fields: Fields) -> dict[str, Any]:
    """One question with its rationale as the reasoning."""
    text = text_of(fields, "text")
    match = _QUESTION.fullmatch(text)
    if not match:
        raise UserError(
            f"'text' is {short(text)}; it must be a question, options, a rationale and 'The answer is (X).'"
        )
    asked, rationale, letter = match.groups()
    question, choices = split_options(asked)
    subject = text_of(fields, "subject")
    row = chosen(question, choices, letter_number("answer", letter, len(choices)), rationale)
    return row | {"subject": subject, "split": "dev", "id": f"{subject}-{fields['number']}"}


def split_options(asked: str) -> tuple[str, list[str]]:
    """A question and its options `(A) ... (B) ...`, taken from the end, since a question may hold such marks too."""
    marks = list(_OPTION.finditer(asked))
    start = next((place for place in reversed(range(len(marks))) if marks[place][1] == "A"), None)
    if (
        start is None
        or "".join(mark[1] for mark in marks[start:]) != "ABCDE"[: len(marks) - start]
        or len(marks) - start < 2
    ):
        raise UserError(f"'text' asks {short(asked)}; it must have options (A), (B) and so on")
    ends = [mark.start() for mark in marks[start + 1 :]] + [len(asked)]
    choices = [asked[mark.end() : end].strip() for mark, end in zip(marks[start:], ends, strict=True)]
    return asked[: marks[start].start()].strip(), choices


SOURCE = Source(
    "mmlu-dev",
    "MMLU's dev questions with rationales",
    all_keys("subject number text"),
    keys(),
    chat,
    terms="MIT; few-shot examples of an evaluation",
    evaluation_only=True,
    read=read,
    distinct=False,
)
