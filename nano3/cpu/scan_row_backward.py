"""The way back of one row through gate, scan and convolution (`scan_row.py`), from its last span to its first.

Of forward it has the states between the spans; everything else is computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nano3.cpu import scan_loops as loops
from nano3.cpu.arrays import array
from nano3.cpu.scan_row import Buffers, Row, buffers

BACKWARD = {
    **{"dy": "chkp", "dye": "cgkrp", "both": "chkk", "dproducts": "cgkk", "dx": "chkp", "pushed": "cgkrp"},
    **{"dcum": "chk", "dstep": "chk", "dend": "ch", "dB": "cgkn", "dC": "cgkn", "grads": "Chpn"},
}
"""The buffers of a span, with their shapes."""
SLOPE = {"slope": "ud"}


class Sums(NamedTuple):
    """Where the gradients of the parameters are added up, over all rows."""

    taps: Tensor
    """(w, d)"""
    bias: Tensor
    """(d,)"""
    skip: Tensor
    """(h, p)"""


class Gradients(NamedTuple):
    """Where those of a row go."""

    rows: Tensor
    """(l, h*p + d + h); nothing is written into the last h columns."""
    dt: Tensor
    """Of the step sizes, (l, h)."""
    decays: Tensor
    """Of dt*A, (l, h)."""
    sums: Sums | None
    """None where the parameters are frozen."""


class Backward:
    """`before` and `dout` (l, h, p): the scan's output before the gate, the gradient of what is behind it."""

    def __init__(self, row: Row, before: Tensor, dout: Tensor, into: Gradients) -> None:
        self.row, self.before, self.dout, self.into = row, array(before), array(dout), into
        self.rows, self.dt, self.decays = (array(t) for t in into[:3])
        self.later = row.nothing

    def run(self, state: Tensor, between: Tensor, dstate: Tensor) -> Tensor:
        """From the states before the first token and `between` the spans (`Row.forward`) and the gradient of the one at
        the end to that of the first."""
        for (begin, stop), before in zip(reversed(self.row.spans), (*between.flip(0), state), strict=True):
            dstate = self._span(begin, stop, before, dstate)
        return dstate

    def _span(self, begin: int, stop: int, state: Tensor, dstate: Tensor) -> Tensor:
        """Returns the gradient of the state before it."""
        row, a, into = self.row, self.row.arrays, self.into
        (slope,) = buffers(SLOPE, row.sizes, row.rows.dtype)["slope"]
        slope = slope[: stop - begin]
        f, b = row.enter(begin, stop, slope), row.buffers(BACKWARD, begin, stop)
        row.advance(f, state)
        row.multiply(f)
        inputs = (self.dout, self.before, a["rows"], *f["enter"], begin, stop, self.rows)
        loops.gate_backward(*inputs, *b["dy dye"])
        grads = self._of_states(f, b, dstate)
        torch.bmm(b.matrices["dy"], f.matrices["x"].mT, out=b.matrices["both"])
        inputs = (*f["step cum"], row.first, begin, stop, *f["products"])
        loops.scores_backward(*inputs, *b["both dproducts dcum dstep"])
        self._of_inputs(f, b)
        inputs = (*b["dx pushed"], *f["x"], *b["dy dye"], *f["carried"], a["skip"], *f["step leave"], begin, stop)
        loops.scan_backward(*inputs, *b["dB dC"], slope, *b["dcum dend dstep"])
        inputs = (*b["dcum dend dstep"], a["A"], row.first, begin, stop)
        loops.decays_backward(*inputs, self.decays, self.dt)
        inputs = (slope, self.later, a["taps"], row.first, begin, stop)
        loops.convolve_backward(*inputs, self.rows, row.offset)
        if into.sums is not None:
            taps, bias, skip = into.sums
            loops.taps_backward(slope, a["rows"], row.offset, row.first, begin, array(taps), array(bias))
            skip.add_((b.tensors["dy"] * f.tensors["x"]).sum((0, 2)))
        behind = len(row.parameters.taps) - 1
        self.later = np.concatenate([slope[:behind], self.later])[:behind]
        return grads[0].clone()

    def _of_states(self, f: Buffers, b: Buffers, dstate: Tensor) -> Tensor:
        """Gradients of the states before every chunk and after the last, (c + 1, h, p, n)."""
        grads = b.tensors["grads"]
        grads[-1] = dstate
        torch.bmm(b.matrices["dye"].mT, f.matrices["C"], out=self.row.by_group(grads[:-1]))
        loops.carry_gradients(*f["carry states"], *b["grads dend"])
        return grads

    def _of_inputs(self, f: Buffers, b: Buffers) -> None:
        """Of x by the scores, of x * step by the states, and of B and C."""
        before, after = self.row.by_group(f.tensors["states"][:-1]), self.row.by_group(b.tensors["grads"][1:])
        ours, theirs = b.matrices, f.matrices
        torch.bmm(ours["both"].mT, ours["dy"], out=ours["dx"])
        torch.bmm(theirs["B"], after.mT, out=ours["pushed"])
        torch.bmm(ours["dproducts"], theirs["B"], out=ours["dC"]).baddbmm_(ours["dye"], before)
        torch.bmm(ours["dproducts"].mT, theirs["C"], out=ours["dB"]).baddbmm_(theirs["xl"], after)
