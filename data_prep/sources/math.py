"""MATH: 12.5k competition problems (Hendrycks et al., NeurIPS 2021), MIT.

Published as `EleutherAI/hendrycks_math` (revision 21a5633873b6a120296cce3e2df9d5550074f4a3, one config a subject; the
original was withdrawn): `problem`, `level` ("Level 1" to "Level 5"), `type`, `solution` with the answer in `\\boxed{}`.
The solution becomes the reasoning.
"""

from __future__ import annotations

import re
from typing import Any

from data_prep.forms.form import Fields, all_keys, keys, short, text_of
from data_prep.sources.source import Source, worked
from nano3.boxed import boxes
from nano3.cli import UserError

_LEVEL = re.compile(r"Level ([1-5]|\?)")


def chat(fields: Fields) -> dict[str, Any]:
    """One problem with its solution as the reasoning."""
    solution = text_of(fields, "solution")
    found = boxes(solution)
    if not found or not found[-1]:
        raise UserError(f"'solution' ends in {short(solution[-30:])}; it must hold the answer in \\boxed{{}}")
    level = text_of(fields, "level")
    if not _LEVEL.fullmatch(level):
        raise UserError(f"'level' is {short(level)}; it must be Level 1 to Level 5")
    return worked(text_of(fields, "problem"), found[-1], solution) | {
        "level": level,
        "subject": text_of(fields, "type"),
    }


SOURCE = Source(
    "math",
    "MATH, solutions as reasoning",
    all_keys("problem solution level type"),
    keys("problem solution level type"),
    chat,
    terms="MIT",
)
