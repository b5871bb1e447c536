"""The seam between nemo-toolkit 2.7.3 and megatron-core 0.16.1, in one place.

2.7.3 is the last NeMo with LLM recipes and was released against an older Megatron-Core; 0.16 is the first whose Mamba
hybrid stack has mixture-of-experts layers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def without_dropped_arguments(function: Callable) -> Callable:
    """`function`, which may also be called with keyword arguments that it no longer has, if they ask for nothing.

    Raises:
        TypeError: such an argument is neither None nor 1, so that leaving it out would change the run.
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        dropped = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        asked = {name: value for name, value in dropped.items() if value is not None and value != 1.0}
        if asked:
            raise TypeError(f"{function.__name__} of this megatron-core has no {sorted(asked)}")
        return function(*args, **kwargs)

    return wrapped


def install() -> None:
    """NeMo passes `no_weight_decay_cond`, `scale_lr_cond` and `lr_mult` to an optimizer factory that dropped them."""
    from megatron.core import optimizer

    if not hasattr(optimizer.get_megatron_optimizer, "__wrapped__"):
        optimizer.get_megatron_optimizer = without_dropped_arguments(optimizer.get_megatron_optimizer)
