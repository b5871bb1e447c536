"""Bytes of frozen linear layers in NF4, as `nano3.nf4` cuts them: codes, 8-bit scales, FP32 scales, means.

Imports neither torch nor NeMo; tests/launch/test_memory_plan.py compares the sums with builds on the meta device.
Of a layer that tensor parallelism cuts the first rank's: others may have one FP32 scale more or less.
"""

from __future__ import annotations

from collections.abc import Iterator

from launch.plan.layout import Layout
from nano3.arch import Arch
from nano3.targets import is_routed
from nano3.tensor_names import Linear, MegatronTensor, linears

BLOCK, NESTED = 64, 256
"""Values that share an 8-bit scale; 8-bit scales that share an FP32 one (`nano3.nf4`)."""


def nf4_bytes(arch: Arch, layout: Layout, number: int) -> dict[str, tuple[int, int]]:
    """Path of each linear layer of a layer -> bytes of one weight, and how many of them this rank has."""
    found = {}
    for linear in linears(arch, number):
        path = f"decoder.layers.{number}.{linear.module}"
        ranks = layout.etp if is_routed(path) else layout.tp
        count = linear.experts // layout.ep if linear.experts else 1
        parts = _by_columns(linear, ranks) if row_parallel(path) else _by_rows(linear, ranks)
        found[path] = (sum(parts), count)
    return found


def row_parallel(path: str) -> bool:
    """Whether tensor parallelism cuts the columns of the layer at `path`."""
    return path.endswith(("linear_proj", "out_proj", "linear_fc2"))


def _whole(linear: Linear) -> MegatronTensor:
    """The weight, of the first expert where there are several."""
    return MegatronTensor(linear.weight_key, (linear.rows, linear.width), linear.blocks)


def _by_rows(linear: Linear, ranks: int) -> Iterator[int]:
    """Of each tensor that the first rank's rows are of; sections are cut one by one."""
    start = 0
    for rows in [rows for _, rows in linear.sections] or [linear.rows]:
        for block in _whole(linear).rows(start, rows // ranks):
            yield part_bytes(linear.width, block.start, block.count, 0, linear.width)
        start += rows


def _by_columns(linear: Linear, ranks: int) -> Iterator[int]:
    for block in _whole(linear).rows(0, linear.rows):
        yield part_bytes(linear.width, block.start, block.count, 0, linear.width // ranks)


def part_bytes(width: int, start: int, count: int, begin: int, end: int) -> int:
    """Of rows `start` to `start + count` and columns `begin` to `end` of a tensor with rows of `width`.

    A block of 64 has 32 bytes of codes and one of scale, also where the cut goes through it.
    """
    if width % BLOCK:  # blocks cross rows
        first, last = start * width // BLOCK, -(-(start + count) * width // BLOCK) - 1
        blocks = last - first + 1
    else:
        low, high = begin // BLOCK, -(-end // BLOCK)
        first, last = start * width // BLOCK + low, (start + count - 1) * width // BLOCK + high - 1
        blocks = count * (high - low)
    return blocks * (BLOCK // 2 + 1) + 4 * (last // NESTED - first // NESTED + 1) + 4
