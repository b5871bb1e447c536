"""How far logits and adapter gradients of one process are from another's.

The GPU must be no further from FP32 than the stand-ins in BF16 are, with room for another order of summation. Errors
are norms over whole tensors: where BF16 sends a token to another expert, single values differ by anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.gpu.record import Row, worst

FACTOR, SLACK = 2.0, 0.02
"""The GPU's error may be this many times the stand-ins' BF16 error, and this much more."""


def distance(ours: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """Relative error of the logits, and the largest of the gradients', each the norm of the difference over the norm.

    Raises:
        ValueError: gradients of one side only, or one of zeros.
    """
    if ours["gradients"].keys() != expected["gradients"].keys():
        raise ValueError(f"gradients of one side only: {ours['gradients'].keys() ^ expected['gradients'].keys()}")

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        if not b.any():
            raise ValueError("a gradient is zero everywhere: nothing would be compared")
        return float((a.double() - b.double()).norm() / b.double().norm())

    pairs = [(value, expected["gradients"][name]) for name, value in ours["gradients"].items()]
    return error(ours["logits"], expected["logits"]), worst(error(*pair) for pair in pairs)


def compare(exact: Path, rounded: Path, gpu: Path) -> list[Row]:
    """Rows for logits and gradients of the files that three processes wrote."""
    truth, standin, real = (torch.load(path) for path in (exact, rounded, gpu))
    rows = []
    for what, allowed, found in zip(
        ("logits", "worst gradient"), distance(standin, truth), distance(real, truth), strict=True
    ):
        rows.append(Row(f"{what}: stand-ins in BF16 against FP32", allowed))
        rows.append(Row(f"{what}: GPU in BF16 against FP32", found, FACTOR * allowed + SLACK))
    return rows
