"""One row of a batch through convolution, scan and gate: the products, around the loops of `scan_loops.py`.

The scan is computed in chunks ("SSD", Dao and Gu 2024, arXiv 2405.21060, section 6), a span of them at a time, whose
buffers fit into a core's caches, each span from the state that the last one left. Letters of shapes are those of
`scan_loops.py`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nano3.cpu import scan_loops as loops
from nano3.cpu.arrays import array
from nano3.cpu.compiled import LOG2_E

SPAN = 256
"""Tokens at a time: at pico's widths the largest buffer of a span is 1 MB. Results depend on it by rounding only."""
CHUNK = 32
"""Callers ask for the GPU kernel's tile, 128 for Nemotron-H. On a CPU chunks as long as a head is wide are faster, and
the result does not depend on it beyond rounding."""
FORWARD = {
    **dict.fromkeys(("step", "cum", "enter", "leave"), "chk"),
    **{"carry": "ch", "x": "chkp", "xl": "cgkrp", "B": "cgkn", "C": "cgkn", "products": "cgkk"},
    **{"scores": "chkk", "within": "chkp", "carried": "cgkrp", "states": "Chpn"},
}
"""The buffers of a span, with their shapes; C = c + 1, for the states before every chunk and after the last."""


@dataclass(frozen=True)
class Parameters:
    """What all rows of a call share, in the arithmetic's dtype, contiguous."""

    taps: Tensor
    """The convolution's weight, (w, d), the oldest tap first."""
    bias: Tensor
    """(d,)"""
    A: Tensor
    """(h,)"""
    skip: Tensor
    """D, (h, p)."""
    groups: int
    silu: bool
    """Whether the convolution has an activation."""


class Buffers:
    """Tensors for the products, and the same memory as arrays for the loops and as stacks of matrices."""

    def __init__(self, tensors: dict[str, Tensor], chunks: int) -> None:
        self.tensors, self.chunks = tensors, chunks
        self.arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self.matrices = {name: matrices(tensor) for name, tensor in tensors.items() if tensor.dim() > 3}
        self._shorter: dict[int, Buffers] = {}

    def __getitem__(self, names: str) -> list[np.ndarray]:
        """Some of the arrays, by their names, for a loop."""
        return [self.arrays[name] for name in names.split()]

    def first(self, chunks: int) -> Buffers:
        """The same for a span that is shorter."""
        if chunks == self.chunks:
            return self
        if chunks not in self._shorter:
            fewer = {name: tensor[: len(tensor) - self.chunks + chunks] for name, tensor in self.tensors.items()}
            self._shorter[chunks] = Buffers(fewer, chunks)
        return self._shorter[chunks]


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple, Buffers] = {}


_kept = _Kept()


def buffers(shapes: dict[str, str], sizes: dict[str, int], dtype: torch.dtype) -> Buffers:
    """This thread's for these sizes, made once: fresh memory would cost as much as what is computed in it."""
    key = (*shapes, *sizes.items(), dtype)
    if key not in _kept.buffers:
        tensors = {name: torch.empty([sizes[s] for s in shape], dtype=dtype) for name, shape in shapes.items()}
        _kept.buffers[key] = Buffers(tensors, sizes["c"])
    return _kept.buffers[key]


def matrices(tensor: Tensor) -> Tensor:
    """(c, h, k, p) -> (c*h, k, p); (c, g, k, r, p) -> (c*g, k, r*p)."""
    return (tensor.flatten(3) if tensor.dim() == 5 else tensor).flatten(0, 1)


@dataclass
class Row:
    """`rows` (l, h*p + d + h): z, xBC and dt; `dt` (l, h): the step sizes; `first` (l,): see `scan_loops.py`."""

    rows: Tensor
    dt: Tensor
    first: np.ndarray
    parameters: Parameters
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        (heads, width), groups = self.parameters.skip.shape, self.parameters.groups
        channels = self.parameters.taps.shape[1]
        length = min(CHUNK, SPAN)
        sizes = {"c": SPAN // length, "k": length, "h": heads, "g": groups, "r": heads // groups, "p": width}
        self.sizes = sizes | {"n": (channels - heads * width) // (2 * groups), "d": channels}
        self.sizes |= {"C": self.sizes["c"] + 1, "u": self.sizes["c"] * length}
        self.rate, self.offset = array(self.parameters.A * LOG2_E), heads * width
        self.arrays = {name: array(getattr(self.parameters, name)) for name in ("taps", "bias", "A", "skip")}
        self.arrays |= {"rows": array(self.rows), "dt": array(self.dt)}
        self.nothing = np.empty((0, channels), self.arrays["rows"].dtype)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the spans begin and stop."""
        tokens = self.sizes["u"]
        return [(begin, min(begin + tokens, len(self.rows))) for begin in range(0, len(self.rows), tokens)]

    def buffers(self, shapes: dict[str, str], begin: int, stop: int) -> Buffers:
        """Those of a span."""
        whole = buffers(shapes, self.sizes, self.rows.dtype)
        return whole.first(-(-(stop - begin) // self.sizes["k"]))

    def forward(self, state: Tensor, before: Tensor, out: Tensor, between: Tensor) -> Tensor:
        """From the state before the first token (h, p, n) to the one at the end. Fills the scan's output `before` the
        gate and `out` behind it, (l, h, p), and the states `between` the spans (spans - 1, h, p, n)."""
        for number, (begin, stop) in enumerate(self.spans):
            if number:
                between[number - 1] = state
            b = self.enter(begin, stop)
            states = self.advance(b, state)
            self.multiply(b)
            loops.scores(*b["step cum"], self.first, begin, stop, *b["products scores"])
            torch.bmm(b.matrices["scores"], b.matrices["x"], out=b.matrices["within"])
            inputs = (*b["within carried x"], self.arrays["skip"], *b["enter"], self.arrays["rows"])
            loops.gate(*inputs, begin, stop, array(before), array(out))
            state = states[-1]
        return state.clone()

    def enter(self, begin: int, stop: int, slope: np.ndarray | None = None) -> Buffers:
        """Decays, and the convolution's output as the products want it; `slope` as `loops.convolve` has it."""
        a, b = self.arrays, self.buffers(FORWARD, begin, stop)
        loops.decays(a["dt"], self.rate, self.first, begin, stop, *b["step cum enter leave carry"])
        inputs = (a["rows"], self.offset, a["taps"], a["bias"], self.parameters.silu, self.first, begin, stop)
        loops.convolve(*inputs, *b["step leave xl B x C"], self.nothing if slope is None else slope)
        return b

    def advance(self, b: Buffers, state: Tensor) -> Tensor:
        """The states before every chunk of a span and after the last, from the one before the span."""
        states = b.tensors["states"]
        states[0] = state
        torch.bmm(b.matrices["xl"].mT, b.matrices["B"], out=self.by_group(states[1:]))
        loops.carry_states(*b["carry states"])
        return states

    def multiply(self, b: Buffers) -> None:
        """C Bᵀ, and C times the states before the chunks."""
        before = self.by_group(b.tensors["states"][:-1])
        torch.bmm(b.matrices["C"], b.matrices["B"].mT, out=b.matrices["products"])
        torch.bmm(b.matrices["C"], before.mT, out=b.matrices["carried"])

    def by_group(self, states: Tensor) -> Tensor:
        """(c, h, p, n) -> (c*g, r*p, n)."""
        return states.view(-1, self.sizes["r"] * self.sizes["p"], self.sizes["n"])
