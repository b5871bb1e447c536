"""What a conversion does in one go: chunks of Megatron tensors that make whole Hugging Face tensors. Torch-free.

A tensor's SHA-256 is taken over its rows in their order, by one thread. So the work on a checkpoint is cut where no
Hugging Face tensor is half-way: an expert's matrix alone, q with k and v, the sections of an in_proj together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from conversion.checkpoint.names import MegatronTensor, RowBlock
from conversion.checkpoint.plan import Planned


@dataclass(frozen=True)
class Box:
    """Rows `first` to `first + count` of a Megatron tensor: one chunk of the checkpoint."""

    planned: Planned
    first: int
    count: int

    @property
    def tensor(self) -> MegatronTensor:
        return self.planned.tensor

    @property
    def nbytes(self) -> int:
        return self.count * self.planned.row_bytes

    def parts(self) -> Iterator[tuple[int, RowBlock]]:
        """(byte where it begins in the box, rows of a Hugging Face tensor), from top to bottom. Padding has none."""
        begin = 0
        for block in self.tensor.blocks:
            start, stop = max(self.first, begin), min(self.first + self.count, begin + block.count)
            if start < stop:
                rows = RowBlock(block.name, block.start + start - begin, stop - start)
                yield (start - self.first) * self.planned.row_bytes, rows
            begin += block.count


Unit = tuple[Box, ...]


def units(tensors: Iterable[Planned], rows: Mapping[str, int]) -> Iterator[Unit]:
    """All chunks of `tensors` in their order, cut as finely as the rule above permits.

    Args:
        rows: Hugging Face tensor name -> its length along axis 0.
    """
    unit: list[Box] = []
    left: dict[str, int] = {}
    for planned in tensors:
        for first, count in planned.chunks():
            box = Box(planned, first, count)
            unit.append(box)
            for _, part in box.parts():
                left[part.name] = left.get(part.name, rows[part.name]) - part.count
                if not left[part.name]:
                    del left[part.name]
            if not left:
                yield tuple(unit)
                unit = []
    assert not unit, f"{sorted(left)[:3]} are never complete"


def files(found: Iterable[Unit], limit: int) -> Iterator[Unit]:
    """Units put together to about `limit` bytes each; a larger one stands alone."""
    together: list[Box] = []
    size = 0
    for unit in found:
        more = sum(box.nbytes for box in unit)
        if together and size + more > limit:
            yield tuple(together)
            together, size = [], 0
        together += unit
        size += more
    if together:
        yield tuple(together)


def names(unit: Unit) -> list[str]:
    """The Hugging Face tensors of a unit, in the order in which they come."""
    return list(dict.fromkeys(part.name for box in unit for _, part in box.parts()))
