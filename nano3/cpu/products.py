"""Matrix products into fresh memory, by the faster of the two libraries that PyTorch has for them on a CPU.

`torch.mm` calls Intel MKL, which first fills a result with zeros and then adds to it. oneDNN's linear layer does not,
and takes 8 to 20 % less time at the sizes of pico's layers (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _onednn() -> Any:
    """oneDNN's linear layer, which PyTorch's compiler calls by this name; None where PyTorch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_LINEAR = _onednn()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times weight (out, in) transposed: (..., out), contiguous, and no view of anything. No autograd."""
    rows, shape = x.flatten(0, -2), (*x.shape[:-1], weight.shape[0])
    if _LINEAR is not None and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel():
        out = _LINEAR(rows, weight, None, "none", [], "")
    else:
        out = torch.mm(rows, weight.t())
    return torch.ops.aten._unsafe_view(out, shape)  # as `matmul` does: a view could not be added to
