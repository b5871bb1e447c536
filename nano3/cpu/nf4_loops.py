"""Compiled loops of NF4 (`nano3/nf4.py`): blocks of values to codes, and codes back to values. FP32, as written."""

from __future__ import annotations

import numpy as np

from nano3.cpu.compiled import exact_loops


@exact_loops
def nearest_codes(values, middles, codes, absmax):
    """Block by block: absmax (blocks,), and codes (n,) uint8 of the nearest of 2**k numbers, `middles` between them.

    values (n,); the last block may be short. A value in the middle of two numbers takes the lower one.
    """
    size = -(-len(values) // len(absmax))
    for block in range(len(absmax)):
        start, stop = block * size, min((block + 1) * size, len(values))
        largest = np.float32(0)
        for i in range(start, stop):
            largest = max(largest, abs(values[i]))
        absmax[block] = largest
        inverse = np.float32(1) / max(largest, np.float32(1e-38))
        for i in range(start, stop):
            x = min(max(values[i] * inverse, np.float32(-1)), np.float32(1))
            code, step = 0, (len(middles) + 1) // 2
            while step:
                code += step if x > middles[code + step - 1] else 0
                step //= 2
            codes[i] = code


@exact_loops
def values_of(packed, absmax, code, skip, out):
    """out (lines, columns) = code[4 bits] * absmax, from value `skip` of each line on.

    packed (lines, 32 * blocks) uint8, the first value in the high half; absmax (lines, blocks); code (16,).
    """
    for line in range(out.shape[0]):
        for j in range(out.shape[1]):
            at = skip + j
            both = np.intp(packed[line, at // 2])
            out[line, j] = code[both & 15 if at % 2 else both >> 4] * absmax[line, at // 64]
