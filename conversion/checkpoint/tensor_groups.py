"""What a conversion does in one go: chunks of Megatron tensors that make whole Hugging Face tensors. Torch-free.

A tensor's SHA-256 is taken over its rows in their order, by one thread. So the work on a checkpoint is cut where no
Hugging Face tensor is half-way: an expert's matrix alone, q with k and v, the sections of an in_proj together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from conversion.checkpoint.plan import Planned
from nano3.tensor_names import MegatronTensor, RowBlock


@dataclass(frozen=True)
class Chunk:
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
        """(byte where it begins in the chunk, rows of a Hugging Face tensor), from top to bottom. Padding has none."""
        begin = 0
        for block in self.tensor.blocks:
            start, stop = max(self.first, begin), min(self.first + self.count, begin + block.count)
            if start < stop:
                rows = RowBlock(block.name, block.start + start - begin, stop - start)
                yield (start - self.first) * self.planned.row_bytes, rows
            begin += block.count


TensorGroup = tuple[Chunk, ...]


def tensor_groups(tensors: Iterable[Planned], rows: Mapping[str, int]) -> Iterator[TensorGroup]:
    """All chunks of `tensors` in their order, cut as finely as the rule above permits.

    Args:
        rows: Hugging Face tensor name -> its length along axis 0.
    """
    group: list[Chunk] = []
    left: dict[str, int] = {}
    for planned in tensors:
        for first, count in planned.chunks():
            chunk = Chunk(planned, first, count)
            group.append(chunk)
            for _, part in chunk.parts():
                left[part.name] = left.get(part.name, rows[part.name]) - part.count
                if not left[part.name]:
                    del left[part.name]
            if not left:
                yield tuple(group)
                group = []
    assert not group, f"{sorted(left)[:3]} are never complete"


def file_groups(found: Iterable[TensorGroup], limit: int) -> Iterator[TensorGroup]:
    """Groups put together to about `limit` bytes each; a larger one stands alone."""
    together: list[Chunk] = []
    size = 0
    for group in found:
        more = sum(chunk.nbytes for chunk in group)
        if together and size + more > limit:
            yield tuple(together)
            together, size = [], 0
        together += group
        size += more
    if together:
        yield tuple(together)


def tensor_names(group: TensorGroup) -> list[str]:
    """The Hugging Face tensors of a group, in the order in which they come."""
    return list(dict.fromkeys(part.name for chunk in group for _, part in chunk.parts()))
