"""Tensors as the arrays that compiled loops take: the same memory, no autograd."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def array(tensor: Tensor) -> np.ndarray:
    """Through DLPack: after `Tensor.numpy` nobody may free the memory before the tensor's end, as Megatron-Core does
    with what it will compute again."""
    return np.from_dlpack(tensor.detach())


def rows(tensor: Tensor, width: int) -> np.ndarray:
    """(..., d) -> (t, d / width, width); a copy where the tensor is not contiguous."""
    return array(tensor.contiguous().view(-1, tensor.shape[-1] // width, width))
