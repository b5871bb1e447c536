"""What a model on disk is to its readers: tensors by Hugging Face's names, any bytes of them, in flat memory.

`HFFolder` reads Hugging Face's form, checked when it is opened; `nemo_folder.py` has NeMo's. Only `rows` touches torch:
bad input is refused before it loads.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.checkpoint.output_folder import CARD, CERTIFICATE
from conversion.checkpoint.safetensors_layout import FP8, INDEX, FileLayout, check_tensors
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.hf_config import FP8_ACTIVATIONS, read_config
from nano3.sealed_folder import MARKER, SEAL, check_seal, require_inside

if TYPE_CHECKING:
    from typing import Self

    import torch

FOREIGN_WEIGHTS = (".gguf", ".bin", ".pt", ".pth")
"""How weights end in forms that this project never writes, which some readers load in place of or on top of ours."""
SIGNATURE = "model.sig"
"""OpenSSF's signature of a folder (docs/certificate.md); it says nothing of what is made from the folder."""
WEIGHT_ENDS = (".safetensors", *FOREIGN_WEIGHTS)


def side_files(folder: Path) -> list[Path]:
    """Everything in a model folder but weights and hidden files, relative to it: configuration, tokenizer, licence.

    Raises `UserError` for a link that leads out of the folder: what is copied along must be the model's.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts) and not _is_weights(relative):
            require_inside(folder, path)
            found.append(relative)
    return found


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors word."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, FP8: torch.float8_e4m3fn}[name]


class ModelFolder(ABC):
    """A model whose tensors have Hugging Face's names. Use as a context manager."""

    path: Path
    side: Path
    """The folder with config.json and tokenizer."""
    arch: Arch
    layout: FileLayout
    """Dtype, shape and bytes of every tensor, as it lies or would lie in safetensors files."""

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor."""
        return {name: entry.dtype for name, entry in self.layout.entries.items()}

    def rows(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows `start` to `start + count` of a tensor, in its dtype."""
        buffer = bytearray(count * self.layout.entries[name].row_bytes)
        return self.rows_into(memoryview(buffer), name, start, count)

    def rows_into(self, buffer: memoryview, name: str, start: int, count: int) -> torch.Tensor:
        """The same in memory of the caller, who has `buffer` as large as the rows; the tensor is a view of it."""
        import torch

        entry = self.layout.entries[name]
        self.read_into(buffer, name, start * entry.row_bytes)
        return torch.frombuffer(buffer, dtype=torch_dtype(entry.dtype)).view(count, *entry.shape[1:])

    @abstractmethod
    def read_into(self, buffer: memoryview, name: str, begin: int) -> None:
        """Fills `buffer` with the bytes of a tensor from byte `begin` on. Several threads may call it at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class RowFolder(ModelFolder):
    """A model that has whole rows to give."""

    @abstractmethod
    def fill_rows(self, buffer: memoryview, name: str, start: int) -> None:
        """Fills `buffer` with rows `start` and following, as many as it has room for."""

    def read_into(self, buffer: memoryview, name: str, begin: int) -> None:
        """As `ModelFolder` has it; where `begin` or the end is amid a row, through memory for the whole rows."""
        row = self.layout.entries[name].row_bytes
        start, skip = divmod(begin, row)
        if not skip and len(buffer) % row == 0:
            return self.fill_rows(buffer, name, start)
        whole = memoryview(bytearray(-(-(skip + len(buffer)) // row) * row))
        self.fill_rows(whole, name, start)
        buffer[:] = whole[skip : skip + len(buffer)]
        return None


class HFFolder(ModelFolder):
    """A Hugging Face model folder that holds exactly the tensors of its config.json. Use as a context manager.

    `quantized` ones may have FP8 tensors and, beyond the model's own, tensors named `..._scale`. A folder of ours must
    be what was written (`nano3.sealed_folder`), unless `as_is`: for who names every difference in it.

    Raises `UserError`, before anything is read, for a missing folder or shard, a truncated file, an index that does
    not fit, a config that we do not support, and missing, unknown or misshapen tensors, by name.
    """

    def __init__(self, path: Path | str, quantized: bool = False, as_is: bool = False) -> None:
        self.path = self.side = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a folder; give a Hugging Face model folder")
        if not as_is:
            check_seal(self.path)
        self.config = read_config(self.path)
        self.quantization = self.config.pop("quantization_config", None) if quantized else None
        self.arch = Arch.from_config(self.config, str(self.path))
        self.layout = FileLayout.read(self.path, quantized)
        shapes = {name: entry.shape for name, entry in self.layout.entries.items()}
        if quantized:
            shapes = {name: shape for name, shape in shapes.items() if not name.endswith("_scale")}
        check_tensors(str(self.path), shapes, {name: spec.shape for name, spec in self.arch.tensors().items()})
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, buffer: memoryview, name: str, begin: int) -> None:
        """Fills `buffer` with the bytes of a tensor from byte `begin` on. Several threads may call it at once."""
        entry = self.layout.entries[name]
        with self._lock:
            if entry.file not in self._files:
                self._files[entry.file] = os.open(self.path / entry.file, os.O_RDONLY)
        if not read_exactly(self._files[entry.file], buffer, entry.start + begin):
            raise UserError(f"{self.path / entry.file} ended while {name} was read; it changed under our hands")

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def read_exactly(file: int, buffer: memoryview, position: int) -> bool:
    """Fills `buffer` from `position` of an open file on; False when the file ends before."""
    while buffer:
        got = os.preadv(file, [buffer], position)
        if got == 0:
            return False
        buffer, position = buffer[got:], position + got
    return True


def _is_weights(relative: Path) -> bool:
    """Weights in any form, what describes and vouches for them, our marker and card; a stale copy must not travel."""
    name = relative.name
    return name.endswith(WEIGHT_ENDS) or name in (
        CARD,
        CERTIFICATE,
        FP8_ACTIVATIONS,
        INDEX,
        MARKER,
        SEAL,
        SIGNATURE,
    )
