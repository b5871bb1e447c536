"""The plan of a Megatron `torch_dist` checkpoint: keys, global shapes, chunks and `_extra_state` objects. Torch-free.

It is derived from the architecture alone, not from a built model, so that a conversion starts at once and needs no
CUDA library; tests/conversion/test_conversion.py compares it, key by key, with what megatron-core's own model asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from conversion.checkpoint.pieces import row_steps
from conversion.checkpoint.safetensors_layout import ITEM_BYTES
from nano3.arch import Arch, padded_vocab_size
from nano3.cli import UserError
from nano3.tensor_names import (
    OUTPUT,
    VOCABULARY_KEYS,
    MegatronTensor,
    carried_tensors,
    extra_state_keys,
    megatron_tensors,
)

PREFIX = "module."
"""What NeMo and Megatron put before the keys of the model itself."""


@dataclass(frozen=True)
class Planned:
    """A tensor to write: what it is made of, its padded global shape, its dtype (safetensors' word)."""

    tensor: MegatronTensor
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        return PREFIX + self.tensor.key

    @property
    def total_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.tensor.row_shape) * ITEM_BYTES[self.dtype]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of every chunk; a chunk of an expert tensor lies within one expert."""
        stacks, rows = self.shape[:2] if self.tensor.experts else (1, self.shape[0])
        for begin in range(0, stacks * rows, rows):
            for start, count in row_steps(rows, self.row_bytes):
                yield begin + start, count


@dataclass(frozen=True)
class Plan:
    """Everything that the `weights/` folder of a checkpoint holds. `objects` are keys of empty `_extra_state`s."""

    tensors: tuple[Planned, ...]
    objects: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all values; the file is a little larger."""
        return sum(tensor.total_bytes for tensor in self.tensors)


def make_plan(
    arch: Arch, dtypes: Mapping[str, str], carried: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> Plan:
    """The plan for `arch`; `dtypes` gives the dtype of every Hugging Face tensor, `carried` the shapes of those that
    are no part of the model.

    Raises `UserError` when tensors that share one Megatron tensor (q, k, v; the experts of a layer) differ in dtype.
    """
    planned = []
    for tensor in (*megatron_tensors(arch), *carried_tensors(carried)):
        shape = tensor.shape
        if tensor.key in VOCABULARY_KEYS:
            # A load on another tensor-parallel size wants more or fewer rows: Megatron-Core permits that for these two
            # tensors, drops the surplus and fills with zeros. The real size stays in hf/config.json.
            shape = (padded_vocab_size(shape[0]), *shape[1:])
        planned.append(Planned(tensor, shape, _common_dtype(tensor, dtypes)))
    objects = [
        f"{PREFIX}{key}/shard_{shard}_{count}"
        for key, count in extra_state_keys(arch).items()
        for shard in range(count)
    ]
    return Plan(tuple(planned), tuple(objects))


def is_native(object_key: str) -> bool:
    """Whether an `_extra_state` belongs to megatron-core's own layer, which stores None, not Transformer Engine's."""
    return object_key.startswith(PREFIX + OUTPUT.removesuffix("weight"))


def _common_dtype(tensor: MegatronTensor, dtypes: Mapping[str, str]) -> str:
    first = tensor.blocks[0].name
    for block in tensor.blocks:
        if dtypes[block.name] != dtypes[first]:
            raise UserError(
                f"{first} is {dtypes[first]} but {block.name} is {dtypes[block.name]}; they are one tensor in Megatron "
                "and need one dtype: store them alike"
            )
    return dtypes[first]
