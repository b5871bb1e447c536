"""The loops between the Mamba mixer's in_proj and its norm: all that is no matrix product (those are in `scan_row.py`).

Shapes: l tokens of a row of the batch, h heads of width p, g groups (r = h/g heads share B and C), n state width,
d = h*p + 2*g*n channels of the convolution, w taps. A call computes tokens `begin` to `stop`, in c chunks of k tokens
from `begin`; u = stop - begin. Heads of a group lie side by side in (c, g, k, r, p), so that one product serves them.

`first` (l,) says which document a token is of: the index of its first token, or -1 where the initial state belongs to
it. Exponents, `cum` and `rate`, are in units of log2. What a last chunk has too many counts as tokens of zeros.
"""

from __future__ import annotations

import numpy as np

from nano3.cpu.compiled import exp2, loops, sigmoid


@loops
def decays(dt, rate, first, begin, stop, step, cum, enter, leave, carry):
    """step (c, h, k): dt (l, h). cum (c, h, k): sums of dt * rate (h,), which is A, since the document's or the chunk's
    start.

    enter, leave (c, h, k): decay from the chunk's start to a token and from a token to the chunk's end; carry (c, h):
    through the chunk. Zero where a document ends in between.
    """
    chunks, heads, length = cum.shape
    zero = dt.dtype.type(0)
    for c in range(chunks):
        top = begin + c * length
        tokens = min(length, stop - top)
        last = first[top + tokens - 1]
        for h in range(heads):
            total = zero
            for i in range(tokens):
                if first[top + i] == top + i:
                    total = zero
                step[c, h, i] = dt[top + i, h]
                total += dt[top + i, h] * rate[h]
                cum[c, h, i] = total
                enter[c, h, i] = exp2(total) if first[top + i] < top else zero
            carry[c, h] = exp2(total) if last < top else zero
            for i in range(length):
                if i < tokens:
                    leave[c, h, i] = exp2(total - cum[c, h, i]) if first[top + i] == last else zero
                else:
                    cum[c, h, i], step[c, h, i], enter[c, h, i], leave[c, h, i] = total, zero, zero, zero


@loops
def convolve(rows, offset, taps, bias, silu, first, begin, stop, step, leave, xl, B, x, C, slope):
    """Convolution and activation of the channels of `rows` (l, ...) from column `offset`, laid out for the products.

    taps (w, d), the oldest first; bias (d,). xl = x * step * leave (c, g, k, r, p), x (c, h, k, p), B and C
    (c, g, k, n). Filled where it is not empty: slope (u, d), the activation's derivative.
    """
    chunks, groups, length, each, width = xl.shape
    count, channels = taps.shape
    inner, state = groups * each * width, B.shape[3]
    zero, one = xl.dtype.type(0), xl.dtype.type(1)
    row = np.empty(channels, xl.dtype)
    row_x = row[:inner].reshape(groups, each, width)
    row_B = row[inner : inner + groups * state].reshape(groups, state)
    row_C = row[inner + groups * state :].reshape(groups, state)
    for c in range(chunks):
        for i in range(length):
            t = begin + c * length + i
            if t >= stop:
                for j in range(channels):
                    row[j] = zero
            else:
                oldest = max(first[t], t - count + 1, 0)
                for j in range(channels):
                    row[j] = bias[j]
                if oldest == t - 3 and count == 4:  # all taps of the usual width at once: a third less time
                    r0, r1 = rows[t - 3, offset : offset + channels], rows[t - 2, offset : offset + channels]
                    r2, r3 = rows[t - 1, offset : offset + channels], rows[t, offset : offset + channels]
                    for j in range(channels):
                        row[j] += taps[0, j] * r0[j] + taps[1, j] * r1[j] + taps[2, j] * r2[j] + taps[3, j] * r3[j]
                    oldest = t + 1
                for source in range(oldest, t + 1):
                    value = rows[source, offset : offset + channels]
                    tap = taps[source - (t - count + 1)]
                    for j in range(channels):
                        row[j] += tap[j] * value[j]
                if silu and slope.shape[0] > 0:
                    for j in range(channels):
                        s = sigmoid(row[j])
                        slope[t - begin, j] = s * (one + row[j] * (one - s))
                        row[j] *= s
                elif silu:
                    for j in range(channels):
                        row[j] *= sigmoid(row[j])
                elif slope.shape[0] > 0:
                    for j in range(channels):
                        slope[t - begin, j] = one
            for g in range(groups):
                for r in range(each):
                    left = step[c, g * each + r, i] * leave[c, g * each + r, i]
                    for j in range(width):
                        x[c, g * each + r, i, j] = row_x[g, r, j]
                        xl[c, g, i, r, j] = row_x[g, r, j] * left
                for j in range(state):
                    B[c, g, i, j] = row_B[g, j]
                    C[c, g, i, j] = row_C[g, j]


@loops
def carry_states(carry, states):
    """states (c + 1, h, p, n): [0] is the state before; what chunk c adds, in [c + 1], becomes the state after it."""
    chunks, heads = carry.shape
    for c in range(chunks):
        for h in range(heads):
            for i in range(states.shape[2]):
                for j in range(states.shape[3]):
                    states[c + 1, h, i, j] += carry[c, h] * states[c, h, i, j]


@loops
def scores(step, cum, first, begin, stop, products, out):
    """out (c, h, k, k): products = C Bᵀ (c, g, k, k) times the step of token s (column) and the decay from it to token
    i (row), or 0 where i does not see s."""
    chunks, heads, length = cum.shape
    each = heads // products.shape[1]
    zero = cum.dtype.type(0)
    for c in range(chunks):
        top = begin + c * length
        for h in range(heads):
            for i in range(length):
                # A row behind the last token sees nothing.
                oldest = first[top + i] - top if top + i < stop else length
                for s in range(length):
                    score = exp2(cum[c, h, i] - cum[c, h, s]) * step[c, h, s] * products[c, h // each, i, s]
                    out[c, h, i, s] = score if (s <= i) & (s >= oldest) else zero


@loops
def gate(within, carried, x, skip, enter, rows, begin, stop, before, out):
    """The scan's output `before` the gate, and `out` behind it, (l, h, p).

    within (c, h, k, p) comes from the chunk's own tokens, carried (c, g, k, r, p) from the state; skip (h, p) is D; the
    gate is in the first h*p columns of `rows`.
    """
    chunks, groups, length, each, width = carried.shape
    for c in range(chunks):
        for i in range(min(length, stop - begin - c * length)):
            t = begin + c * length + i
            for h in range(groups * each):
                g, r = h // each, h % each
                z = rows[t, h * width : (h + 1) * width]
                for j in range(width):
                    y = within[c, h, i, j] + enter[c, h, i] * carried[c, g, i, r, j] + skip[h, j] * x[c, h, i, j]
                    before[t, h, j] = y
                    out[t, h, j] = y * z[j] * sigmoid(z[j])


@loops
def gate_backward(dout, before, rows, enter, begin, stop, drows, dy, dye):
    """From dout (l, h, p), the gradients of the gate, into `drows`, and of the scan's output: dy (c, h, k, p), and
    dye = dy * enter (c, g, k, r, p)."""
    chunks, groups, length, each, width = dye.shape
    zero, one = dy.dtype.type(0), dy.dtype.type(1)
    for c in range(chunks):
        for i in range(length):
            t = begin + c * length + i
            for h in range(groups * each):
                g, r = h // each, h % each
                if t >= stop:
                    for j in range(width):
                        dy[c, h, i, j] = zero
                        dye[c, g, i, r, j] = zero
                    continue
                z, dz = rows[t, h * width : (h + 1) * width], drows[t, h * width : (h + 1) * width]
                for j in range(width):
                    s = sigmoid(z[j])
                    dz[j] = dout[t, h, j] * before[t, h, j] * s * (one + z[j] * (one - s))
                    y = dout[t, h, j] * z[j] * s
                    dy[c, h, i, j] = y
                    dye[c, g, i, r, j] = y * enter[c, h, i]


@loops
def carry_gradients(carry, states, grads, dend):
    """grads (c + 1, h, p, n): the last is the gradient of the state after the chunks; what chunk c's outputs ask of the
    state before it, in [c], becomes that state's gradient. dend (c, h): of the exponent of `carry`."""
    chunks, heads = carry.shape
    for back in range(chunks):
        c = chunks - 1 - back
        for h in range(heads):
            total = carry.dtype.type(0)
            for i in range(states.shape[2]):
                for j in range(states.shape[3]):
                    total += grads[c + 1, h, i, j] * states[c, h, i, j]
                    grads[c, h, i, j] += carry[c, h] * grads[c + 1, h, i, j]
            dend[c, h] = total * carry[c, h]


@loops
def scores_backward(step, cum, first, begin, stop, products, both, dproducts, dcum, dstep):
    """both (c, h, k, k): the scores' gradients become the scores. Gradients of products, step and (natural) cum."""
    chunks, heads, length = cum.shape
    each = heads // products.shape[1]
    zero = cum.dtype.type(0)
    dproducts[:] = zero
    dcum[:] = zero
    dstep[:] = zero
    for c in range(chunks):
        top = begin + c * length
        for h in range(heads):
            g = h // each
            for i in range(length):
                oldest = first[top + i] - top if top + i < stop else length
                total = zero
                for s in range(length):
                    decay = exp2(cum[c, h, i] - cum[c, h, s])
                    decay = decay if (s <= i) & (s >= oldest) else zero
                    grad = both[c, h, i, s]
                    asked = grad * decay
                    dproducts[c, g, i, s] += asked * step[c, h, s]
                    asked *= products[c, g, i, s]
                    dstep[c, h, s] += asked
                    asked *= step[c, h, s]
                    dcum[c, h, s] -= asked
                    total += asked
                    both[c, h, i, s] = decay * step[c, h, s] * products[c, g, i, s]
                dcum[c, h, i] += total


@loops
def scan_backward(dx, pushed, x, dy, dye, carried, skip, step, leave, begin, stop, dB, dC, slope, dcum, dend, dstep):
    """All that meets at a token: slope (u, d) becomes the gradient before the activation.

    dx (c, h, k, p) is the gradient of x that comes from the scores, pushed (c, g, k, r, p) is B times the gradient of
    the state. Adds to dcum, dstep (c, h, k) and dend (c, h).
    """
    chunks, groups, length, each, width = pushed.shape
    heads, state = groups * each, dB.shape[3]
    zero = x.dtype.type(0)
    for c in range(chunks):
        for i in range(min(length, stop - begin - c * length)):
            t = begin + c * length + i
            for h in range(heads):
                g, r = h // each, h % each
                steep = slope[t - begin, h * width : (h + 1) * width]
                left, full = leave[c, h, i], leave[c, h, i] * step[c, h, i]
                entering, leaving = zero, zero
                for j in range(width):
                    leaving += pushed[c, g, i, r, j] * x[c, h, i, j]
                    entering += dye[c, g, i, r, j] * carried[c, g, i, r, j]
                    steep[j] *= dx[c, h, i, j] + pushed[c, g, i, r, j] * full + skip[h, j] * dy[c, h, i, j]
                dstep[c, h, i] += leaving * left
                dcum[c, h, i] += entering - leaving * full
                dend[c, h] += leaving * full
            for g in range(groups):
                at = heads * width + g * state
                steep_B = slope[t - begin, at : at + state]
                at += groups * state
                steep_C = slope[t - begin, at : at + state]
                for j in range(state):
                    steep_B[j] *= dB[c, g, i, j]
                    steep_C[j] *= dC[c, g, i, j]


@loops
def decays_backward(dcum, dend, dstep, A, first, begin, stop, da, ddt):
    """da (l, h), gradients of dt*A, and ddt (l, h), of dt by dt*A and by what `dstep` (c, h, k) has of it."""
    chunks, heads, length = dcum.shape
    zero = da.dtype.type(0)
    for c in range(chunks):
        top = begin + c * length
        tokens = min(length, stop - top)
        for h in range(heads):
            total = dend[c, h]
            for back in range(tokens):
                i = tokens - 1 - back
                total += dcum[c, h, i]
                da[top + i, h] = total
                ddt[top + i, h] = total * A[h] + dstep[c, h, i]
                if first[top + i] == top + i:
                    total = zero


@loops
def convolve_backward(dbefore, later, taps, first, begin, stop, drows, offset):
    """The gradient of the convolution's input, into `drows`, from that of its output, dbefore (u, d) and, of the tokens
    behind them, later (at most w - 1, d)."""
    count, channels = taps.shape
    end = stop + later.shape[0]
    zero = taps.dtype.type(0)
    for t in range(begin, stop):
        row = drows[t, offset : offset + channels]
        for j in range(channels):
            row[j] = zero
        for target in range(t, min(t + count, end)):
            if first[target] <= t:
                grad = dbefore[target - begin] if target < stop else later[target - stop]
                tap = taps[t - target + count - 1]
                for j in range(channels):
                    row[j] += tap[j] * grad[j]


@loops
def taps_backward(dbefore, rows, offset, first, begin, dtaps, dbias):
    """Adds the gradients of the weight, (w, d), and of the bias, (d,)."""
    count, channels = dtaps.shape
    for i in range(dbefore.shape[0]):
        t = begin + i
        for j in range(channels):
            dbias[j] += dbefore[i, j]
        for source in range(max(first[t], t - count + 1, 0), t + 1):
            value = rows[source, offset : offset + channels]
            dtap = dtaps[source - (t - count + 1)]
            for j in range(channels):
                dtap[j] += dbefore[i, j] * value[j]
