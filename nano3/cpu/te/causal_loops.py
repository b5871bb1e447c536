"""The way back through causal attention, compiled: products block by block, and between them one loop over the scores.

The queries of all heads that share a key are rows of one matrix, r for each token. Results that are as narrow as a head
are computed transposed, a head high and a block of keys wide, where the products reach twice the rate.
"""

from __future__ import annotations

import numpy as np

from nano3.cpu.compiled import exp2, loops

KEYS, ROWS = 64, 256
"""A block of scores: with its gradient, 128 kB in FP32, it stays in a core's second cache."""


@loops
def causal_backward(q, k, v, do, lse, delta, dq, dk, dv):
    """q, do (s*r, d), k, v (s, d), lse, delta (s*r,); fills dk, dv (s, d) and adds to dq (s*r, d).

    q and lse come in units of log2, delta is the sum of do times the output; dk leaves without the factor ln 2, dq
    without the scale.
    """
    (tokens, width), rows = k.shape, q.shape[0]
    each = rows // tokens
    zero = q.dtype.type(0)
    memory_scores, memory_grads = np.empty(ROWS * KEYS, q.dtype), np.empty(ROWS * KEYS, q.dtype)
    memory_rows, memory_keys = np.empty(ROWS * width, q.dtype), np.empty(KEYS * width, q.dtype)
    memory_dk, memory_dv = np.empty(KEYS * width, q.dtype), np.empty(KEYS * width, q.dtype)
    for start in range(0, tokens, KEYS):
        keys = min(KEYS, tokens - start)
        k_block, v_block = k[start : start + keys], v[start : start + keys]
        across = memory_keys[: width * keys].reshape(width, keys)
        dk_across, dv_across = (
            memory_dk[: width * keys].reshape(width, keys),
            memory_dv[: width * keys].reshape(width, keys),
        )
        for i in range(width):
            for j in range(keys):
                dk_across[i, j] = zero
                dv_across[i, j] = zero
        for top in range(start * each, rows, ROWS):
            count = min(ROWS, rows - top)
            scores, grads = (
                memory_scores[: count * keys].reshape(count, keys),
                memory_grads[: count * keys].reshape(count, keys),
            )
            narrow = memory_rows[: count * width].reshape(count, width)
            q_rows, do_rows = q[top : top + count], do[top : top + count]
            np.dot(q_rows, k_block.T, scores)
            np.dot(do_rows, v_block.T, grads)
            for i in range(count):
                seen = (top + i) // each - start + 1  # a token sees the keys up to itself
                level, total = lse[top + i], delta[top + i]
                for j in range(keys):
                    score = exp2(scores[i, j] - level)
                    score = score if j < seen else zero
                    scores[i, j] = score
                    grads[i, j] = score * (grads[i, j] - total)
            np.dot(do_rows.T, scores, across)
            for i in range(width):
                for j in range(keys):
                    dv_across[i, j] += across[i, j]
            np.dot(q_rows.T, grads, across)
            for i in range(width):
                for j in range(keys):
                    dk_across[i, j] += across[i, j]
            np.dot(grads, k_block, narrow)
            for i in range(count):
                for j in range(width):
                    dq[top + i, j] += narrow[i, j]
        for j in range(keys):
            for i in range(width):
                dk[start + j, i] = dk_across[i, j]
                dv[start + j, i] = dv_across[i, j]
