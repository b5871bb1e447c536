"""The compiled loops' own functions: how exact they are, and that a NaN comes out as one."""

from __future__ import annotations

import numpy as np
import pytest

from nano3.cpu.compiled import exp2, loops, sigmoid


@loops
def powers(x, out):
    for i in range(len(x)):
        out[i] = exp2(x[i])


@loops
def sigmoids(x, out):
    for i in range(len(x)):
        out[i] = sigmoid(x[i])


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 3e-7), (np.float64, 1e-13)])
def test_powers_of_two(dtype, bound):
    x = np.linspace(-125.9, 125.9, 100_001).astype(dtype)
    out = np.empty_like(x)
    powers(x, out)
    exact = np.exp2(x.astype(np.longdouble))
    assert np.abs(out / exact - 1).max() < bound
    whole = np.arange(-126, 127).astype(dtype)
    out = np.empty_like(whole)
    powers(whole, out)
    assert (out == np.ldexp(1.0, whole.astype(int))).all()  # by hand: no rounding at all


def test_what_is_out_of_range_is_small_large_or_no_number():
    x = np.array([-1e30, -np.inf, 1e30, np.inf, np.nan], np.float32)
    out = np.empty_like(x)
    powers(x, out)
    assert (out[:2] == np.float32(2) ** -126).all()
    assert (out[2:4] == np.float32(2) ** 126).all()
    assert np.isnan(out[4])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoids(dtype):
    x = np.array([0, 1, -1, 50, -50, np.nan], dtype)
    out = np.empty_like(x)
    sigmoids(x, out)
    assert out[:5] == pytest.approx([0.5, 0.7310585786300049, 0.2689414213699951, 1, 0], abs=1e-7)
    assert np.isnan(out[5])


def test_the_stubs_are_for_loops_only():
    for stub in (exp2, sigmoid):
        with pytest.raises(NotImplementedError, match="in compiled loops only"):
            stub(1.0)
