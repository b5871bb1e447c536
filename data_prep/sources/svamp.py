"""SVAMP: 1,000 arithmetic word problems with varied wording (Patel et al., NAACL 2021), MIT.

Published as `ChilleD/SVAMP` (revision 5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef) and in the authors' repository: `ID`,
`Body`, `Question`, `Equation`, `Answer`, `Type`; 700 / 300 rows. The equation becomes the reasoning.
"""

from __future__ import annotations

from typing import Any

from data_prep.forms.form import Fields, all_keys, keys, short, text_of
from data_prep.sources.source import Source, worked
from nano3.cli import UserError


def chat(fields: Fields) -> dict[str, Any]:
    """One problem; `145.0`, as the authors write whole numbers, is answered `145`."""
    body = text_of(fields, "Body").strip()
    question = f"{body if body.endswith(('.', '?', '!')) else body + '.'} {text_of(fields, 'Question').strip()}"
    value = fields.get("Answer")
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or abs(number) > 1e12:
        raise UserError(f"'Answer' is {short(value)}; it must be a number")
    answer = f"{number:.0f}" if number == int(number) else repr(number)
    row = worked(question, answer, f"{text_of(fields, 'Equation').strip()} = {answer}")
    return row | {"subject": text_of(fields, "Type"), "id": text_of(fields, "ID")}


SOURCE = Source(
    "svamp",
    "SVAMP, equations as reasoning",
    all_keys("ID Body Question Equation Answer Type"),
    keys("Body Question Equation Answer Type"),
    chat,
    harmless=all_keys("question_concat"),
    terms="MIT",
)
