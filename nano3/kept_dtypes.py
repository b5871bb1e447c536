"""Tensors that keep their dtype when the model around them is cast. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def keep_dtype(module: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Makes casts of `module`, or of a model around it, pass over its tensors `names`; they follow to the device."""
    module._apply = partial(_apply_but_to, names, module)  # type: ignore[method-assign]


def _apply_but_to(names: tuple[str, ...], module: torch.nn.Module, function: Callable, recurse: bool = True) -> Any:
    """`Module._apply`; the tensors `names` keep their dtype and values."""
    kept = {name: getattr(module, name).data for name in names}
    torch.nn.Module._apply(module, function, recurse)
    for name, value in kept.items():
        tensor = getattr(module, name)
        if value.device.type != "meta":
            tensor.data = value.to(device=tensor.device)
    return module
