"""Many layouts, one after the other, each against the one-rank run of the same case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from nano3.lora import lora  # noqa: F401  # imported here once, not by every rank
from nano3.parity.case import Case, Sizes
from nano3.parity.comparison import NEAREST_TIE, Outcome, Row, compare, run
from nano3.parity.layouts import Wanted

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


def run_suite(layouts: Sequence[Wanted], precisions: Iterable[str]) -> Iterator[Row]:
    """A row for every layout and precision, as soon as it is known; the distributed optimizer knows no FP64.

    Raises:
        ValueError: a case in which a token is so near a routing tie that rounding may decide it.
    """
    for precision in precisions:
        single: dict[Case, Outcome] = {}
        for text, sizes, wide in layouts:
            case = replace(wide, dtype=DTYPES[precision])
            if case.distributed and case.dtype == torch.float64:
                continue
            plain = case.plain
            if plain not in single:
                single[plain] = run(plain, Sizes())
                if single[plain].tie <= NEAREST_TIE:
                    tie = single[plain].tie
                    raise ValueError(f"a token of {plain} is {tie:.1e} from a routing tie; change its seed")
            yield compare(text, case, sizes, run(case, sizes), single[plain])
