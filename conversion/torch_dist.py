"""megatron-core's `torch_dist` checkpoint, written and read a chunk at a time: no model, no process group, flat memory.

The format is PyTorch's distributed checkpoint (chunks in `*.distcp`, a `.metadata` that says where they lie) plus
megatron-core's `common.pt` and `metadata.json`. PyTorch's own writer keeps every tensor of a file alive until the file
is done, which for 63 GB is the whole model; writing the chunks ourselves is shorter than working around it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from conversion.layout import some
from conversion.names import MegatronTensor
from conversion.plan import Plan, is_native
from conversion.safetensors_io import torch_dtype
from nano3.cli import UserError

RowReader = Callable[[str, int, int], torch.Tensor]
"""(Hugging Face tensor name, first row, number of rows) -> those rows."""

FILE_BYTES = 4 << 30
"""A new `.distcp` file begins once one is this large, so that loads can read several at once."""

WORDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_weights(folder: Path, plan: Plan, rows: RowReader, advance: Callable[[int], Any]) -> None:
    """Writes the `weights/` folder of a checkpoint. `advance` is told the bytes of every chunk when it is written."""
    writer = _ChunkWriter(folder)
    for key in plan.objects:
        buffer = io.BytesIO()
        # What the modules store without FP8: Transformer Engine an empty byte tensor, megatron-core's own layer None.
        torch.save([None if is_native(key) else torch.empty(0, dtype=torch.uint8)], buffer)
        writer.add(MetadataIndex(key), buffer.getvalue())
        writer.metadata[key] = BytesStorageMetadata()
    for planned in plan.tensors:
        chunks = []
        for first, count in planned.chunks():
            offset, size = planned.tensor.box(first, count)
            chunk = gather(planned.tensor, first, count, rows).view(size)
            buffer = io.BytesIO()
            torch.save(chunk, buffer)
            writer.add(MetadataIndex(planned.key, offset), buffer.getbuffer())
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
            advance(chunk.nbytes)
        properties = TensorProperties(dtype=torch_dtype(planned.dtype))
        writer.metadata[planned.key] = TensorStorageMetadata(properties, torch.Size(planned.shape), chunks)
    writer.finish()


def gather(tensor: MegatronTensor, first: int, count: int, rows: RowReader) -> torch.Tensor:
    """Rows `first` to `first + count` of a Megatron tensor, from the row blocks that make it; zeros behind the last."""
    parts, begin = [], 0
    for block in tensor.blocks:
        start, stop = max(first, begin), min(first + count, begin + block.count)
        if start < stop:
            parts.append(rows(block.name, block.start + start - begin, stop - start))
        begin += block.count
    missing = count - sum(len(part) for part in parts)
    if missing:
        # A chunk of padding alone still takes its dtype from the tensor it pads.
        sample = parts[0] if parts else rows(tensor.blocks[0].name, 0, 1)
        parts.append(sample.new_zeros((missing, *sample.shape[1:])))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class TorchDistReader:
    """Reads regions of the tensors of a `torch_dist` folder. Keeps the last chunk in memory and no more.

    Raises `UserError` when `folder` is no such checkpoint, or its files are shorter than its metadata says.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / ".metadata").is_file() or not (folder / "metadata.json").is_file():
            raise UserError(
                f"{folder} is not a Megatron torch_dist checkpoint (.metadata, metadata.json): wrong folder?"
            )
        self.folder = folder
        metadata = FileSystemReader(folder).read_metadata()
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._places: dict[str, list[tuple[tuple[int, ...], _StorageInfo]]] = {}
        lengths: dict[str, int] = {}
        for index, place in metadata.storage_data.items():
            self._places.setdefault(index.fqn, []).append((tuple(index.offset or ()), place))
            lengths[place.relative_path] = max(lengths.get(place.relative_path, 0), place.offset + place.length)
        for file, length in lengths.items():
            if not (folder / file).is_file() or (folder / file).stat().st_size < length:
                raise UserError(f"{folder / file} is missing or truncated: copy the checkpoint again")
        self._last: tuple[_StorageInfo, torch.Tensor] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor by key."""
        return {key: tuple(value.size) for key, value in self._tensors.items()}

    def dtype(self, key: str) -> str:
        """Dtype of a tensor in safetensors' word; `UserError` for one that we do not convert."""
        dtype = self._tensors[key].properties.dtype
        if dtype not in WORDS:
            raise UserError(
                f"{self.folder}: {key} is {dtype}; known are {some(map(str, WORDS))}: not a plain checkpoint"
            )
        return WORDS[dtype]

    def read(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of `size` at `offset` of a tensor, whatever way its chunks are cut."""
        entry = self._tensors[key]
        result = torch.empty(size, dtype=entry.properties.dtype)
        chunk_sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        seen = 0
        for begin, place in self._places[key]:
            extent = chunk_sizes[begin]
            low = [max(o, b) for o, b in zip(offset, begin, strict=True)]
            high = [min(o + s, b + e) for o, s, b, e in zip(offset, size, begin, extent, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            chunk = self._chunk(place).view(extent)
            part = chunk[tuple(slice(a - c, b - c) for a, b, c in zip(low, high, begin, strict=True))]
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = part
            seen += part.numel()
        if seen != result.numel():
            raise UserError(f"{self.folder}: chunks of {key} do not cover it; the checkpoint is incomplete")
        return result

    def whole(self, key: str) -> torch.Tensor:
        """A whole tensor."""
        shape = self.shapes[key]
        return self.read(key, (0,) * len(shape), shape)

    def _chunk(self, place: _StorageInfo) -> torch.Tensor:
        if self._last is None or self._last[0] != place:
            self._last = None
            with (self.folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                buffer = io.BytesIO(file.read(place.length))
            self._last = (place, torch.load(buffer, map_location="cpu", weights_only=True))
        return self._last[1]


class _ChunkWriter:
    """Appends serialized chunks to `.distcp` files and remembers where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: BinaryIO | None = None
        self._files = 0

    def add(self, index: MetadataIndex, data: bytes | memoryview) -> None:
        if self._file is None or self._file.tell() > FILE_BYTES:
            self._close()
            self._name = f"__0_{self._files}.distcp"
            self._file = (self.folder / self._name).open("wb")
            self._files += 1
        self._places[index] = _StorageInfo(self._name, self._file.tell(), len(data))
        self._file.write(data)

    def finish(self) -> None:
        """Writes what makes the files a checkpoint, last of all."""
        self._close()
        metadata = Metadata(self.metadata, planner_data=None, storage_data=self._places, storage_meta=StorageMeta())
        metadata.version = CURRENT_DCP_VERSION
        torch.save({}, self.folder / "common.pt")
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        config |= {"common_backend": "torch", "common_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps(config))
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
