"""Compiled loops over the rows of a matrix: RMS norm over groups of a row, squared ReLU; forward and backward.

Shapes: t rows of g groups of w values, x (t, g, w).
"""

from __future__ import annotations

from nano3.cpu.compiled import loops


@loops
def normalize(x, weight, eps, rstd, out):
    """out = x * rstd * weight (g, w), with rstd (t, g) = 1 / sqrt(mean of x² over w + eps)."""
    rows, groups, width = x.shape
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for t in range(rows):
        for g in range(groups):
            total = zero
            for j in range(width):
                total += x[t, g, j] * x[t, g, j]
            factor = one / (total / x.dtype.type(width) + x.dtype.type(eps)) ** x.dtype.type(0.5)
            rstd[t, g] = factor
            for j in range(width):
                out[t, g, j] = x[t, g, j] * factor * weight[g, j]


@loops
def normalize_backward(dout, x, weight, rstd, dx):
    """dx = rstd * (u - x * rstd² * mean of u * x), u = dout * weight."""
    rows, groups, width = x.shape
    zero = x.dtype.type(0)
    for t in range(rows):
        for g in range(groups):
            total = zero
            for j in range(width):
                total += dout[t, g, j] * weight[g, j] * x[t, g, j]
            factor = rstd[t, g]
            along = total / x.dtype.type(width) * factor * factor * factor
            for j in range(width):
                dx[t, g, j] = dout[t, g, j] * weight[g, j] * factor - x[t, g, j] * along


@loops
def squared_relu(x, positive, out):
    """positive = relu(x), and its square; flat."""
    zero = x.dtype.type(0)
    for j in range(len(x)):
        value = zero if x[j] < zero else x[j]  # a NaN stays one
        positive[j] = value
        out[j] = value * value


@loops
def squared_relu_backward(dout, positive, dx):
    """dx = 2 * dout * positive; flat."""
    for j in range(len(positive)):
        dx[j] = (dout[j] + dout[j]) * positive[j]


@loops
def weighted_squared_relu(x, weights, out):
    """out = relu(x)² * weights (t,); x and out (t, w)."""
    zero = x.dtype.type(0)
    for t in range(x.shape[0]):
        for j in range(x.shape[1]):
            value = zero if x[t, j] < zero else x[t, j]
            out[t, j] = value * value * weights[t]


@loops
def weighted_squared_relu_backward(dout, x, weights, dx, dweights):
    """dx (t, w) = 2 * relu(x) * weights * dout, dweights (t,) = sum over w of relu(x)² * dout."""
    zero = x.dtype.type(0)
    for t in range(x.shape[0]):
        twice, total = weights[t] + weights[t], zero
        for j in range(x.shape[1]):
            value = zero if x[t, j] < zero else x[t, j]
            total += value * value * dout[t, j]
            dx[t, j] = value * twice * dout[t, j]
        dweights[t] = total
