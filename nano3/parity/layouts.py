"""Which layouts are compared, and how one is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from nano3.cli import UserError
from nano3.parity.case import PATTERN, Case, Sizes

LAYOUTS = (
    "tp2", "tp4", "ep2", "ep4", "etp2", "pp2", "pp3", "cp2", "cp4", "dp2",
    "tp2.ep2", "tp2.cp2", "ep2.pp2", "cp2.ep2", "tp2.pp2.ep2", "tp2.ep2.etp2", "tp2.pp2.cp2.ep2",
    "tp2.ep2@M-*EM-", "pp3@M-*EM-", "cp2.ep2@MEM-E",
    "tp2.ep2+each", "cp2.ep2+each", "ep2.pp2+each", "tp2.ep2+dora", "cp2+dora",
    "etp2+each", "etp2.dp4+each", "tp2.ep2.etp2+each", "etp2+dora",
    "tp2.ep2+allgather", "tp2.ep2.etp2+allgather",
    "dp2+distributed", "ep2+distributed", "tp2.ep2.dp2+distributed", "tp2.ep2+recompute", "pp2+recompute", "cp2+full",
    "ep2+gated", "tp2+gated", "cp2+gated", "pp2+gated+full", "pp2+gated+recompute",
    "tp2.ep2+chunked", "cp2+chunked", "pp2+chunked+full", "dp2+chunked", "tp2.cp2@M*E+chunked",
    "tp2@M*E+nf4", "etp2@ME+nf4+each", "tp2.ep2@ME+nf4+dora", "dp2@ME+nf4+distributed",
)  # fmt: skip
"""Among them a pattern with dense layers, one without attention, other kinds of adapters, the other dispatcher, the
distributed optimizer, layers that are computed again in the backward pass, the loss in chunks, and a base in NF4."""
NF4_LAYOUTS = tuple(
    f"{sizes}+nf4{variant}"
    for sizes, variant in (
        ("tp2", ""), ("tp4", ""), ("ep2", ""), ("etp2", ""), ("pp2", ""), ("cp2", ""), ("tp2.ep2", ""),
        ("tp2.ep2.etp2", ""), ("tp2.pp2.cp2.ep2", ""), ("tp2.ep2", "+each"), ("etp2", "+each"), ("tp2.ep2", "+dora"),
        ("etp2", "+dora"), ("tp2.ep2", "+recompute"), ("cp2", "+full"), ("tp2.ep2.dp2", "+distributed"),
    )
)  # fmt: skip
"""`python -m nano3.parity nf4`: all of the pattern, by hand; `LAYOUTS` has small ones of these."""
VARIANTS: dict[str, dict[str, Any]] = {
    "each": {"adapters": "each"},
    "dora": {"adapters": "dora"},
    "gated": {"adapters": "gated"},
    "allgather": {"dispatcher": "allgather"},
    "distributed": {"distributed": True},
    "recompute": {"recompute": ("moe", "layernorm")},
    "full": {"recompute": ("full",)},
    "chunked": {"loss_chunk": 20},
    "nf4": {"nf4": True},
}
"""What may stand behind a plus sign, and what it changes in the case."""


class Wanted(NamedTuple):
    """A comparison to make; `case` is the FP64 one."""

    text: str
    sizes: Sizes
    case: Case


def parse_layouts(texts: Iterable[str]) -> list[Wanted]:
    """What LAYOUT, LAYOUT@PATTERN, LAYOUT+VARIANT or all, pattern first, ask for; variants may be several.

    Raises:
        UserError: a text that is none of them.
    """
    found = []
    for text in texts:
        rest, *variants = text.split("+")
        sizes, _, pattern = rest.partition("@")
        for variant in variants:
            if variant not in VARIANTS:
                raise UserError(f"layout {text!r}: variants are {', '.join(VARIANTS)}, not {variant!r}")
        try:
            changes = {name: value for variant in variants for name, value in VARIANTS[variant].items()}
            case = Case(pattern=pattern or PATTERN, **changes)
            found.append(Wanted(text, Sizes.parse(sizes), case))
        except ValueError as error:
            raise UserError(str(error)) from error
    return found
