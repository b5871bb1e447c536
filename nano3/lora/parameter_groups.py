"""Which adapter parameters the optimizer treats apart. Imports neither torch nor NeMo."""

from __future__ import annotations

from typing import Any


def is_b(name: str, parameter: Any) -> bool:
    """Whether a parameter is a B, which LoRA+ (arXiv 2402.12354) gives a learning rate above A's."""
    del parameter
    return ".adapter.linear_out." in name


def is_magnitude(name: str, parameter: Any) -> bool:
    """Whether a parameter is a DoRA magnitude: weight decay would pull the rows' lengths to zero, so it gets none."""
    del parameter
    return name.endswith(".adapter.magnitude")
