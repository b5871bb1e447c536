"""Hugging Face folders, a few rows at a time: a checked reader and a writer, both with flat memory.

Only `HFFolder.rows` and `SafetensorsWriter.write` touch torch: bad input is refused before it loads.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from conversion.folders import CERTIFICATE
from conversion.layout import FP8, INDEX, Layout, check_tensors
from nano3.arch import Arch
from nano3.cli import MARKER, UserError
from nano3.hf_config import read_config

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors word."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, FP8: torch.float8_e4m3fn}[name]


def side_files(folder: Path) -> list[Path]:
    """Everything in a model folder but weights and hidden files, relative to it: configuration, tokenizer, licence."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts) and not _is_weights(relative):
            found.append(relative)
    return found


class HFFolder:
    """A Hugging Face model folder that holds exactly the tensors of its config.json. Use as a context manager.

    `quantized` ones may have FP8 tensors and, beyond the model's own, tensors named `..._scale`.

    Raises `UserError`, before anything is read, for a missing folder or shard, a truncated file, an index that does
    not fit, a config that we do not support, and missing, unknown or misshapen tensors, by name.
    """

    def __init__(self, path: Path | str, quantized: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a folder; give a Hugging Face model folder")
        self.config = read_config(self.path)
        self.quantization = self.config.pop("quantization_config", None) if quantized else None
        self.arch = Arch.from_config(self.config, str(self.path))
        self.layout = Layout.read(self.path, quantized)
        shapes = {name: entry.shape for name, entry in self.layout.entries.items()}
        if quantized:
            shapes = {name: shape for name, shape in shapes.items() if not name.endswith("_scale")}
        check_tensors(str(self.path), shapes, {name: spec.shape for name, spec in self.arch.tensors().items()})
        self._files: dict[str, int] = {}

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor as its file says."""
        return {name: entry.dtype for name, entry in self.layout.entries.items()}

    def rows(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows `start` to `start + count` of a tensor, in its dtype, from the file."""
        import torch

        entry = self.layout.entries[name]
        if entry.file not in self._files:
            self._files[entry.file] = os.open(self.path / entry.file, os.O_RDONLY)
        buffer = bytearray(count * entry.row_bytes)
        view, position = memoryview(buffer), entry.start + start * entry.row_bytes
        while view:
            got = os.preadv(self._files[entry.file], [view], position)
            if got == 0:
                raise UserError(f"{self.path / entry.file} ended while {name} was read; it changed under our hands")
            view, position = view[got:], position + got
        return torch.frombuffer(buffer, dtype=torch_dtype(entry.dtype)).view(count, *entry.shape[1:])

    def __enter__(self) -> HFFolder:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


class SafetensorsWriter:
    """Writes the files of a layout: headers at once, rows in any order, each exactly once. Use as a context manager."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._missing = {name: entry.stop - entry.start for name, entry in layout.entries.items()}
        self._files: dict[str, int] = {}

    def __enter__(self) -> SafetensorsWriter:
        for file, header in self.layout.headers.items():
            descriptor = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._files[file] = descriptor
            os.pwrite(descriptor, struct.pack("<Q", len(header)) + header, 0)
            os.ftruncate(descriptor, self.layout.sizes[file])
        if self.layout.index is not None:
            (self.folder / INDEX).write_bytes(self.layout.index)
        return self

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Writes `rows` as rows `start` and following of the tensor `name`."""
        import torch

        entry = self.layout.entries[name]
        assert rows.dtype == torch_dtype(entry.dtype), (name, rows.dtype, entry.dtype)
        assert tuple(rows.shape[1:]) == entry.shape[1:], (name, rows.shape, entry.shape)
        assert start + rows.shape[0] <= entry.rows, (name, start, rows.shape, entry.shape)
        array: Any = rows.contiguous().view(-1).view(torch.uint8).numpy()
        view = memoryview(array)
        self._missing[name] -= len(view)
        position = entry.start + start * entry.row_bytes
        while view:
            put = os.pwrite(self._files[entry.file], view, position)
            view, position = view[put:], position + put

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in self._files.values():
            if error is None:
                os.fsync(file)
            os.close(file)
        if error is None:
            unwritten = [name for name, count in self._missing.items() if count]
            assert not unwritten, f"not written exactly once: {unwritten[:3]}"


def _is_weights(relative: Path) -> bool:
    """Weights in any form, their index, our marker and certificate; a stale copy of those must not travel."""
    name = relative.name
    return name.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth")) or name in (CERTIFICATE, INDEX, MARKER)
