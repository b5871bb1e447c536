"""The largest magnitude among plain floating-point values, from their bits: finds NaN and infinity on the way.

Of IEEE numbers (BF16, F16, F32) with one sign the order of the values is the order of their bits as integers; NaN and
infinity come last. So two integer maxima, over the signed and the unsigned view of the same bytes, give the largest
magnitude of the positive and of the negative values: 0.06 s a GB and no copy, where torch.isfinite takes 2.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nano3.cli import UserError

_VIEWS: dict[str, tuple[Any, Any, int]] = {
    "BF16": (np.int16, np.uint16, 0x8000),
    "F16": (np.int16, np.uint16, 0x8000),
    "F32": (np.int32, np.uint32, 0x80000000),
}
"""Dtype -> signed view, unsigned view, sign bit."""

_SLICE = 1 << 18
"""Bytes looked at in one go: both passes then read from the processor's cache."""


def largest_magnitude(data: memoryview | bytearray, dtype: str) -> float:
    """max |value| over `data`, values of `dtype` (safetensors' word) in this machine's byte order; 0.0 when empty.

    NaN or inf when one of the values is not finite. Exact: the result is one of the values.
    """
    signed, unsigned, sign = _VIEWS[dtype]
    bits = 0
    whole = np.frombuffer(data, np.uint8)
    for begin in range(0, len(whole), _SLICE):
        part = whole[begin : begin + _SLICE]
        positive, negative = int(part.view(signed).max()), int(part.view(unsigned).max()) - sign
        bits = max(bits, positive, negative)
    if dtype == "BF16":  # the upper half of an F32
        return float(np.uint32(bits << 16).view(np.float32))
    return float(unsigned(bits).view(np.float16 if dtype == "F16" else np.float32))


def refuse_not_finite(largest: float, name: str, where: Path) -> None:
    """Raises `UserError` naming the tensor whose largest magnitude is NaN or infinity."""
    if not largest < float("inf"):
        raise UserError(
            f"{where}: {name} holds NaN or infinity; the training or the merge went wrong, or a file is damaged"
        )
