"""How safetensors files are laid out: headers, index, and where every tensor lies. Torch-free but for `torch_dtype`.

The header of every file is kept as the bytes that it is, so that a folder which went through another format and back
has the same files, not only the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import FileName, parse_json, read_bytes
from nano3.safetensors_header import AGAIN, INDEX, parse_header, parse_index, read_header
from nano3.sealed_folder import require_inside

if TYPE_CHECKING:
    import torch

TensorTable = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype in safetensors' word, shape)."""

SINGLE = "model.safetensors"
PLAIN_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
"""The dtypes that we convert, in the words of safetensors headers, and their size in bytes."""

FP8 = "F8_E4M3"
ITEM_BYTES = PLAIN_BYTES | {FP8: 1}
"""The same with that of our quantized checkpoints."""

OLD_EMBEDDING = "backbone.embedding.weight"
"""What transformers 5.3.0 called `backbone.embeddings.weight` when it saved; other releases do not load it."""

SHARD_BYTES = 5_000_000_000
"""Largest file of a layout that we make ourselves (Hugging Face's own limit for uploads)."""


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors word."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, FP8: torch.float8_e4m3fn}[name]


class LayoutFile(TypedDict):
    """What `FileLayout.to_json` writes: file -> header, and the index as it was."""

    headers: dict[FileName, str]
    index: str | None


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `start` to `stop` of `file`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Length of axis 0; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along axis 0."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]


class FileLayout:
    """The safetensors files of a folder: their header bytes, the index if there is one, and every tensor's place."""

    def __init__(self, headers: Mapping[str, bytes], index: bytes | None, where: str = "") -> None:
        self.headers, self.index = dict(headers), index
        self.entries: dict[str, Entry] = {}
        self.sizes: dict[str, int] = {}
        for file, header in self.headers.items():
            self._add(file, header, where + file)

    @classmethod
    def read(cls, folder: Path, quantized: bool = False) -> FileLayout:
        """Reads the headers of a Hugging Face folder. Raises `UserError` for a truncated or missing file, an index
        that does not fit the files, or FP8 tensors unless they are `quantized`."""
        paths = list(folder.glob("*.safetensors"))
        for path in paths:
            require_inside(folder, path)
        files = {path.name for path in paths}
        index = read_bytes(folder / INDEX, AGAIN) if (folder / INDEX).is_file() else None
        weight_map = parse_index(index, folder / INDEX) if index is not None else {}
        wanted = set(weight_map.values()) if index is not None else {SINGLE}
        missing = sorted(wanted - files)
        if missing:
            more = f"; {INDEX} names {len(wanted)} files" if index is not None else ""
            raise UserError(f"{folder} lacks {some(missing)}{more}: download the model again")
        if files - wanted:
            raise UserError(
                f"{folder} holds {some(sorted(files - wanted))}, which "
                + (f"{INDEX} does not name" if index is not None else f"no {INDEX} explains")
                + ": remove the stray file or download the model again"
            )
        layout = cls({file: read_header(folder / file) for file in sorted(wanted)}, index, f"{folder}/")
        if not quantized:
            layout._refuse_codes()
        for file, size in layout.sizes.items():
            actual = (folder / file).stat().st_size
            if actual != size:
                raise UserError(
                    f"{folder / file} has {actual:,} bytes, its header promises {size:,}: truncated; download it again"
                )
        if index is not None:
            layout._check_index(folder, weight_map)
        return layout

    @classmethod
    def make(cls, tensors: TensorTable, shard_bytes: int = SHARD_BYTES) -> FileLayout:
        """A layout of our own for `tensors`, name -> (dtype, shape): files of at most `shard_bytes` in Hugging Face's
        naming, tensors in the given order but FP32 first in each file, which keeps every tensor aligned."""
        shards: list[list[str]] = [[]]
        filled = 0
        size = {name: math.prod(shape) * ITEM_BYTES[dtype] for name, (dtype, shape) in tensors.items()}
        for name in tensors:
            if shards[-1] and filled + size[name] > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size[name]
        if len(shards) == 1:
            return cls({SINGLE: make_header(shards[0], tensors)}, None)
        headers: dict[str, bytes] = {}
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            headers[file] = make_header(names, tensors)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        return cls(headers, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())

    @classmethod
    def from_json(cls, text: bytes, where: str) -> FileLayout:
        """The layout that `to_json` wrote. Raises `UserError` for a damaged one, and for files in other folders."""
        data = parse_json(text, LayoutFile, where, "copy the checkpoint again")
        headers = {file: header.encode() for file, header in data["headers"].items()}
        return cls(headers, data["index"].encode() if data["index"] is not None else None, f"{where}, ")

    def to_json(self) -> str:
        """The layout as text, byte for byte recoverable."""
        index = self.index.decode() if self.index is not None else None
        return json.dumps({"headers": {file: header.decode() for file, header in self.headers.items()}, "index": index})

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    def fits(self, tensors: TensorTable) -> bool:
        """Whether these are exactly our tensors, with our dtypes and shapes."""
        return {name: (entry.dtype, entry.shape) for name, entry in self.entries.items()} == dict(tensors)

    def _add(self, file: str, header: bytes, where: str) -> None:
        begin = 8 + len(header)
        self.sizes[file] = begin
        for name, item in parse_header(header, where).items():
            if name in self.entries:
                raise UserError(
                    f"tensor {name} is in {self.entries[name].file} and in {file}: download the model again"
                )
            if item["dtype"] not in ITEM_BYTES:
                raise UserError(
                    f"tensor {name} in {file} is {item['dtype']}; known are {', '.join(ITEM_BYTES)}: "
                    "give the unquantized checkpoint"
                )
            shape = tuple(item["shape"])
            start, stop = (begin + offset for offset in item["data_offsets"])
            if stop - start != math.prod(shape) * ITEM_BYTES[item["dtype"]]:
                raise UserError(f"tensor {name} in {file}: {stop - start} bytes do not make {item['dtype']} {shape}")
            self.entries[name] = Entry(file, item["dtype"], shape, start, stop)
            self.sizes[file] = stop

    def _refuse_codes(self) -> None:
        for name, entry in self.entries.items():
            if entry.dtype not in PLAIN_BYTES:
                raise UserError(
                    f"tensor {name} in {entry.file} is {entry.dtype}; known are {', '.join(PLAIN_BYTES)}: "
                    "give the unquantized checkpoint"
                )

    def _check_index(self, folder: Path, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.entries or self.entries[name].file != file:
                raise UserError(
                    f"{folder / INDEX} says that {name} is in {file}, and it is not: download the model again"
                )
        stray = sorted(self.entries.keys() - weight_map.keys())
        if stray:
            raise UserError(f"{folder / INDEX} does not name {some(stray)}: download the model again")


def check_tensors(where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `UserError` naming the tensors that are missing in `found`, unknown, or of another shape."""
    missing = [name for name in expected if name not in found]
    if OLD_EMBEDDING in found and missing:
        raise UserError(
            f"{where} has {OLD_EMBEDDING}, as transformers 5.3 named the embedding; load it there and save it with a "
            f"later one, or rename it: {some(missing)}"
        )
    if missing:
        raise UserError(f"{where} lacks {some(missing)}: it is not a complete model of its config.json")
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise UserError(f"{where} holds {some(unknown)}, which its config.json does not have: a model of another kind?")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{where}: {name} has shape {found[name]}, its config.json says {shape}")


def some(names: Iterable[str]) -> str:
    """The first names of a long list."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def make_header(names: list[str], tensors: TensorTable, metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a safetensors file with these of `tensors`, FP32 first, and `metadata` beside the format's name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in sorted(names, key=lambda name: -ITEM_BYTES[tensors[name][0]]):
        dtype, shape = tensors[name]
        stop = offset + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
