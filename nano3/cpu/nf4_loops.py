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
def values_of(packed, scale8, scale, offset, code, dynamic, place, out):
    """out (lines, 64 * blocks) = code[4 bits] * absmax, absmax = dynamic[8 bits] * scale + offset.

    packed (lines, 32 * blocks) uint8, the first value in the high half; scale8 (lines, blocks) uint8; scale (nested
    blocks,), offset a number; code (16,), dynamic (256,); place: the first block's number in the tensor's order, and
    blocks from one line to the next.
    """
    first, stride = place
    table = np.empty(16, np.float32)
    for line in range(out.shape[0]):
        for block in range(scale8.shape[1]):
            nested = (first + line * stride + block) // 256 - first // 256
            absmax = dynamic[scale8[line, block]] * scale[nested] + offset
            for i in range(16):
                table[i] = code[i] * absmax
            for at in range(32 * block, 32 * block + 32):
                both = np.intp(packed[line, at])
                out[line, 2 * at] = table[both >> 4]
                out[line, 2 * at + 1] = table[both & 15]
