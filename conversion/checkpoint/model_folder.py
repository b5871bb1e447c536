"""What a model on disk is to its readers, in Hugging Face's form or in NeMo's: tensors by name, any bytes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.checkpoint.safetensors_layout import FP8, FileLayout
from nano3.arch import Arch

if TYPE_CHECKING:
    from typing import Self

    import torch


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
