"""Hugging Face folders, a few rows at a time: a checked reader with flat memory.

Only `HFFolder.rows` touches torch: bad input is refused before it loads.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from conversion.checkpoint.folders import CARD, CERTIFICATE
from conversion.checkpoint.model_folder import ModelFolder
from conversion.checkpoint.safetensors_layout import INDEX, FileLayout, check_tensors
from nano3.arch import Arch
from nano3.cli import MARKER, UserError
from nano3.hf_config import FP8_ACTIVATIONS, read_config

FOREIGN_WEIGHTS = (".gguf", ".bin", ".pt", ".pth")
"""How weights end in forms that this project never writes, which some readers load in place of or on top of ours."""
WEIGHT_ENDS = (".safetensors", *FOREIGN_WEIGHTS)


def side_files(folder: Path) -> list[Path]:
    """Everything in a model folder but weights and hidden files, relative to it: configuration, tokenizer, licence."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts) and not _is_weights(relative):
            found.append(relative)
    return found


class HFFolder(ModelFolder):
    """A Hugging Face model folder that holds exactly the tensors of its config.json. Use as a context manager.

    `quantized` ones may have FP8 tensors and, beyond the model's own, tensors named `..._scale`.

    Raises `UserError`, before anything is read, for a missing folder or shard, a truncated file, an index that does
    not fit, a config that we do not support, and missing, unknown or misshapen tensors, by name.
    """

    def __init__(self, path: Path | str, quantized: bool = False) -> None:
        self.path = self.side = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a folder; give a Hugging Face model folder")
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
    """Weights in any form, what describes them, our marker, certificate and card; a stale copy must not travel."""
    name = relative.name
    return name.endswith(WEIGHT_ENDS) or name in (
        CARD,
        CERTIFICATE,
        FP8_ACTIVATIONS,
        INDEX,
        MARKER,
    )
