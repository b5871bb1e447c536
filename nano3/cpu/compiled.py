"""How the loops of the CPU backend are compiled: by Numba, at their first call, once for a dtype and a processor.

PyTorch makes a pass over memory for every operation; a compiled loop does all of them while a token is in the core's
first cache. What is compiled is kept beside the source (or in Numba's cache folder where that cannot be written), so
it costs its seconds once. Arrays are C-contiguous, in FP32 or FP64, and the arithmetic is theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.compiler import Compiler
from numba.core.registry import cpu_target
from numba.extending import overload

FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered, or they would not vectorize. Infinity and NaN keep their meaning: a NaN comes out as one."""
LOG2_E = 1.4426950408889634
"""exp(x) = exp2(x * LOG2_E)."""


class _NoAlias(Compiler):
    """Numba's pipeline, told that no two arguments overlap: with ten arrays in a loop, LLVM else gives up."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state.flags.noalias = True


def loops(function: Callable[..., Any]) -> Any:
    """Compiles a nest of loops. No array may be given twice."""
    return _compiled(function, FAST)


def exact_loops(function: Callable[..., Any]) -> Any:
    """The same with every operation rounded as it is written, where bits must be those of another program."""
    return _compiled(function, False)


def _compiled(function: Callable[..., Any], fastmath: set[str] | bool) -> Any:
    compiled = numba.njit(pipeline_class=_NoAlias, fastmath=fastmath, error_model="numpy", nogil=True)(function)
    # Neither the folder of the source nor Numba's own can be written: then every process compiles for itself.
    with contextlib.suppress(RuntimeError):
        compiled.enable_caching()
    return compiled


def load_compiler() -> None:
    """Loads what Numba needs to know before its first loop. A process that forks ranks does so once for all of them:
    0.12 s of CPU time less in each, a quarter of what a rank of the parity suite takes."""
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def exp2(x: Any) -> Any:
    """2**x in loops. FP32: vectorized, to 3e-7, within 2**-126 and 2**126; FP64: the C library's."""
    raise NotImplementedError("in compiled loops only")


def _exp2_single(x):
    # The whole part goes into the exponent's bits, the rest, at most a half, into a polynomial (Cephes, exp2f).
    y = np.float32(-126.0) if x < np.float32(-126.0) else x
    y = np.float32(126.0) if y > np.float32(126.0) else y  # a NaN stays one
    whole = np.int32(y + np.float32(126.5))
    f = y - np.float32(whole - np.int32(126))
    p = np.float32(1.535336188319500e-4)
    p = p * f + np.float32(1.339887440266574e-3)
    p = p * f + np.float32(9.618437357674640e-3)
    p = p * f + np.float32(5.550332471162809e-2)
    p = p * f + np.float32(2.402264791363012e-1)
    p = p * f + np.float32(6.931472028550421e-1)
    p = p * f + np.float32(1.0)
    return p * np.int32((whole + np.int32(1)) << np.int32(23)).view(np.float32)


def _exp2_double(x):
    return 2.0**x


_INSIDE: dict[str, Any] = {"jit_options": {"fastmath": FAST, "error_model": "numpy", "forceinline": True}}


@overload(exp2, **_INSIDE)
def _exp2_of(x):
    return _exp2_single if x == types.float32 else _exp2_double


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) in loops."""
    raise NotImplementedError("in compiled loops only")


def _sigmoid_single(x):
    return np.float32(1.0) / (np.float32(1.0) + exp2(x * np.float32(-LOG2_E)))


def _sigmoid_double(x):
    return 1.0 / (1.0 + exp2(x * -LOG2_E))


@overload(sigmoid, **_INSIDE)
def _sigmoid_of(x):
    return _sigmoid_single if x == types.float32 else _sigmoid_double
