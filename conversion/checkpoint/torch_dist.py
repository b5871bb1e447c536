"""megatron-core's `torch_dist` checkpoint, read any rows at a time: no model, no process group, flat memory.

The format is PyTorch's distributed checkpoint (chunks in `*.distcp`, a `.metadata` that says where they lie) plus
megatron-core's `common.pt` and `metadata.json`. A chunk is what `torch.save` makes of a tensor: a zip archive whose
member `data/0` holds the values, uncompressed. So the rows that are wanted are read straight from where they lie.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from conversion.checkpoint.pieces import read_exactly
from conversion.checkpoint.safetensors_layout import some
from nano3.cli import UserError

RowReader = Callable[[str, int, int], torch.Tensor]
"""(Hugging Face tensor name, first row, number of rows) -> those rows."""

WORDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_STORAGES = {torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage", torch.float32: "FloatStorage"}

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, size) of a region of a tensor."""


class TorchDistReader:
    """Reads regions of the tensors of a `torch_dist` folder; several threads may. It closes its files when it goes.

    Raises `UserError` when `folder` is no such checkpoint, or its files are shorter than its metadata says.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / ".metadata").is_file() or not (folder / "metadata.json").is_file():
            raise UserError(
                f"{folder} is not a Megatron torch_dist checkpoint (.metadata, metadata.json): wrong folder?"
            )
        self.folder = folder
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # whatever unpickling raises
            raise UserError(f"{folder}/.metadata is damaged ({error!r}): copy the checkpoint again") from None
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._places: dict[str, dict[tuple[int, ...], _StorageInfo]] = {}
        lengths: dict[str, int] = {}
        for index, place in metadata.storage_data.items():
            self._places.setdefault(index.fqn, {})[tuple(index.offset or ())] = place
            lengths[place.relative_path] = max(lengths.get(place.relative_path, 0), place.offset + place.length)
        for file, length in lengths.items():
            if not (folder / file).is_file() or (folder / file).stat().st_size < length:
                raise UserError(f"{folder / file} is missing or truncated: copy the checkpoint again")
        self._sizes = {
            key: {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
            for key, entry in self._tensors.items()
        }
        self._files = {file: os.open(folder / file, os.O_RDONLY) for file in sorted(lengths)}
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
                result.copy_(self._load(places[offset]).view(size))
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
            return self._load(place).view(extent)[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        strides = [math.prod(extent[axis + 1 :]) for axis in range(len(extent))]
        first = sum(o * stride for o, stride in zip(offset, strides, strict=True))
        count = 1 + sum((s - 1) * stride for s, stride in zip(size, strides, strict=True))
        span = memoryview(bytearray(count * dtype.itemsize))
        self._fill(place, span, begin + first * dtype.itemsize)
        return torch.frombuffer(span, dtype=dtype).as_strided(size, strides)

    def _fill(self, place: _StorageInfo, buffer: memoryview, position: int) -> None:
        if not read_exactly(self._files[place.relative_path], buffer, position):
            raise UserError(f"{self.folder / place.relative_path} ended while it was read; it changed under our hands")

    def _load(self, place: _StorageInfo) -> torch.Tensor:
        """A chunk as PyTorch loads it, for those that are no plain piece of memory."""
        window = io.BufferedReader(_Window(self._files[place.relative_path], place.offset, place.length))
        return torch.load(window, map_location="cpu", weights_only=True)


def data_begin(file: int, place: _StorageInfo, dtype: torch.dtype, count: int) -> int | None:
    """Where in an open file the `count` values of a chunk begin; None when they do not lie there in one piece, in
    their order, as little-endian `dtype`."""
    window = io.BufferedReader(_Window(file, place.offset, place.length))
    try:
        with zipfile.ZipFile(window) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            storage, begin, size, stride = _Unpickler(archive.open(members["data.pkl"])).load()
            order = archive.read(members["byteorder"]) if "byteorder" in members else b"little"
            data = members["data/0"]
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError):
        return None
    strides = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
    plain = storage[1] == _STORAGES.get(dtype) and storage[2] == "0" and begin == 0 and tuple(stride) == strides
    whole = math.prod(size) == count and data.file_size == count * dtype.itemsize and not data.compress_type
    if not plain or not whole or order != b"little":
        return None
    # The lengths of name and extra field stand at byte 26 of a member's own header, which is 30 bytes long.
    name, extra = struct.unpack("<HH", os.pread(file, 4, place.offset + data.header_offset + 26))
    return place.offset + data.header_offset + 30 + name + extra


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


class _Unpickler(pickle.Unpickler):
    """Takes what `torch.save` says of one tensor apart: (storage, offset, size, stride). Loads no other thing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES.values():
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


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
