"""megatron-core's `torch_dist` checkpoint, read any rows at a time: no model, no process group, flat memory.

The format is PyTorch's distributed checkpoint (chunks in `*.distcp`, a `.metadata` that says where they lie) plus
megatron-core's `common.pt` and `metadata.json`. A chunk is what `torch.save` makes of a tensor: a zip archive whose
member `data/0` holds the values, uncompressed. So the rows that are wanted are read straight from where they lie.
"""

from __future__ import annotations

import io
import math
import os
import struct
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from conversion.checkpoint.pieces import read_exactly
from conversion.checkpoint.safetensors_layout import some
from nano3.checkpoint_metadata import check_folder
from nano3.cli import UserError
from nano3.pickles import REMEDY, STORAGES, load_state, saved_tensor

RowReader = Callable[[str, int, int], torch.Tensor]
"""(Hugging Face tensor name, first row, number of rows) -> those rows."""

WORDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_MOST_DESCRIPTION = 1 << 16
"""Largest `data.pkl` of one tensor, in bytes; they have about 150."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, size) of a region of a tensor."""


class TorchDistReader:
    """Reads regions of the tensors of a `torch_dist` folder; several threads may. It closes its files when it goes.

    Raises `UserError` when `folder` is no such checkpoint, or its files are shorter than its metadata says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = check_folder(folder)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._places: dict[str, dict[tuple[int, ...], _StorageInfo]] = {}
        for index, place in metadata.storage_data.items():
            self._places.setdefault(index.fqn, {})[tuple(index.offset or ())] = place
        self._sizes = {
            key: {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
            for key, entry in self._tensors.items()
        }
        files = {place.relative_path for place in metadata.storage_data.values()}
        self._files = {file: os.open(folder / file, os.O_RDONLY) for file in sorted(files)}
        weakref.finalize(self, _close, list(self._files.values()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor by key."""
        return {key: tuple(value.size) for key, value in self._tensors.items()}

    @property
    def files(self) -> list[Path]:
        """The files that hold the chunks."""
        return [self.folder / file for file in self._files]

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
        itemsize = self._tensors[key].properties.dtype.itemsize
        return self.read_into(memoryview(bytearray(max(1, math.prod(size)) * itemsize)), key, offset, size)

    def read_into(self, buffer: memoryview, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The same in memory of the caller, who has `buffer` at least as large as the box; the tensor is a view."""
        dtype = self._tensors[key].properties.dtype
        result = torch.frombuffer(buffer, dtype=dtype, count=math.prod(size)).view(size)
        extents, places = self._sizes[key], self._places[key]
        if extents.get(offset) == size:
            if not self._straight(places[offset], result, buffer):
                result.copy_(self._load(places[offset], dtype, result.numel()).view(size))
            return result
        seen = 0
        for begin, place in places.items():
            extent = extents[begin]
            low = [max(o, b) for o, b in zip(offset, begin, strict=True)]
            high = [min(o + s, b + e) for o, s, b, e in zip(offset, size, begin, extent, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inner = tuple(a - c for a, c in zip(low, begin, strict=True))
            shape = tuple(b - a for a, b in zip(low, high, strict=True))
            part = self._region(place, dtype, extent, (inner, shape))
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = part
            seen += part.numel()
        if seen != result.numel():
            raise UserError(f"{self.folder}: chunks of {key} do not cover it; the checkpoint is incomplete")
        return result

    def whole(self, key: str) -> torch.Tensor:
        """A whole tensor."""
        shape = self.shapes[key]
        return self.read(key, (0,) * len(shape), shape)

    def _straight(self, place: _StorageInfo, result: torch.Tensor, buffer: memoryview) -> bool:
        """Reads a whole chunk to where it is wanted; False when it does not lie in one piece."""
        begin = data_begin(self._files[place.relative_path], place, result.dtype, result.numel())
        if begin is None:
            return False
        self._fill(place, buffer[: result.nbytes], begin)
        return True

    def _region(self, place: _StorageInfo, dtype: torch.dtype, extent: tuple[int, ...], box: Box) -> torch.Tensor:
        """A region of a chunk of size `extent`: what lies between its first and its last value is read."""
        offset, size = box
        begin = data_begin(self._files[place.relative_path], place, dtype, math.prod(extent))
        if begin is None:
            whole = self._load(place, dtype, math.prod(extent)).view(extent)
            return whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        strides = [math.prod(extent[axis + 1 :]) for axis in range(len(extent))]
        first = sum(o * stride for o, stride in zip(offset, strides, strict=True))
        count = 1 + sum((s - 1) * stride for s, stride in zip(size, strides, strict=True))
        span = memoryview(bytearray(count * dtype.itemsize))
        self._fill(place, span, begin + first * dtype.itemsize)
        return torch.frombuffer(span, dtype=dtype).as_strided(size, strides)

    def _fill(self, place: _StorageInfo, buffer: memoryview, position: int) -> None:
        if not read_exactly(self._files[place.relative_path], buffer, position):
            raise UserError(f"{self.folder / place.relative_path} ended while it was read; it changed under our hands")

    def _load(self, place: _StorageInfo, dtype: torch.dtype, count: int) -> torch.Tensor:
        """A chunk of `count` values as PyTorch loads it, for those that are no plain piece of memory."""
        window = io.BufferedReader(_Window(self._files[place.relative_path], place.offset, place.length))
        where = f"{self.folder / place.relative_path} at byte {place.offset}"
        tensor = load_state(window, where)
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.numel() != count:
            raise UserError(f"{where} holds another chunk than .metadata says; {REMEDY}")
        return tensor


def data_begin(file: int, place: _StorageInfo, dtype: torch.dtype, count: int) -> int | None:
    """Where in an open file the `count` values of a chunk begin; None when they do not lie there in one piece, in
    their order, as little-endian `dtype`."""
    window = io.BufferedReader(_Window(file, place.offset, place.length))
    try:
        with zipfile.ZipFile(window) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if members["data.pkl"].compress_type or members["data.pkl"].file_size > _MOST_DESCRIPTION:
                return None
            saved = saved_tensor(archive.read(members["data.pkl"]))
            order = archive.read(members["byteorder"]) if "byteorder" in members else b"little"
            data = members["data/0"]
    except Exception:  # whatever is wrong with the archive: PyTorch's own reader will say it
        return None
    strides = tuple(math.prod(saved.size[axis + 1 :]) for axis in range(len(saved.size)))
    plain = saved[:3] == (STORAGES.get(dtype), "0", 0) and saved.stride == strides
    whole = math.prod(saved.size) == count and data.file_size == count * dtype.itemsize and not data.compress_type
    if not plain or not whole or order != b"little":
        return None
    # The lengths of name and extra field stand at byte 26 of a member's own header, which is 30 bytes long.
    lengths = os.pread(file, 4, place.offset + data.header_offset + 26)
    name, extra = struct.unpack("<HH", lengths.ljust(4, b"\xff"))
    begin = data.header_offset + 30 + name + extra
    return place.offset + begin if begin + data.file_size <= place.length else None


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: int, begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        got = os.preadv(self._file, [view], self._begin + self._at) if view else 0
        self._at += got
        return got
