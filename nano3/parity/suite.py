"""Many layouts, one after the other, each against the one-rank run of the same case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from nano3 import lora  # noqa: F401  # imported here once, not by every rank
from nano3.cli import UserError
from nano3.parity.case import PATTERN, Case, Sizes
from nano3.parity.comparison import NEAREST_TIE, Outcome, Row, compare, run

KINDS = ("shared", "each", "dora")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


def parse_layouts(texts: Iterable[str]) -> list[tuple[str, Sizes, Case]]:
    """(text, sizes, case) of every LAYOUT, LAYOUT@PATTERN, LAYOUT+ADAPTERS or both, pattern first.

    Raises:
        UserError: a text that is none of them.
    """
    found = []
    for text in texts:
        rest, _, adapters = text.partition("+")
        sizes, _, pattern = rest.partition("@")
        if adapters not in ("", *KINDS):
            raise UserError(f"layout {text!r}: adapters are {', '.join(KINDS)}, not {adapters!r}")
        try:
            case = Case(pattern=pattern or PATTERN, adapters=adapters or "shared")  # type: ignore[arg-type]
            found.append((text, Sizes.parse(sizes), case))
        except ValueError as error:
            raise UserError(str(error)) from error
    return found


def run_suite(layouts: Sequence[tuple[str, Sizes, Case]], precisions: Iterable[str]) -> Iterator[Row]:
    """A row for every layout and precision, as soon as it is known.

    Raises:
        ValueError: a case in which a token is so near a routing tie that rounding may decide it.
    """
    for precision in precisions:
        single: dict[Case, Outcome] = {}
        for text, sizes, wide in layouts:
            case = replace(wide, dtype=DTYPES[precision])
            if case not in single:
                single[case] = run(case, Sizes())
                if single[case].tie <= NEAREST_TIE:
                    raise ValueError(f"a token of {case} is {single[case].tie:.1e} from a routing tie; change its seed")
            yield compare(text, case, sizes, run(case, sizes), single[case])
