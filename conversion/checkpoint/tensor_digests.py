"""What a tensor is, and the content hash of a model: over all its tensors, however they lie in files. Torch-free.

Each tensor has the SHA-256 of its bytes in row order; the hash is the SHA-256 over the lines `name dtype shape digest`,
sorted. Tensors have Hugging Face's names, also in a NeMo checkpoint, so a model has one hash in either form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fact:
    """What one tensor is: dtype in safetensors' word, shape, SHA-256 of its bytes in row order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As certificates say it."""
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


Facts = Mapping[str, Fact]
"""Hugging Face tensor name -> what it is. The same for a NeMo checkpoint, whose tensors are named as there."""


def raw_bytes(rows: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a safetensors file."""
    import torch

    array: Any = rows.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def content_hash(facts: Facts) -> str:
    """The content hash of a model from the facts of all its tensors."""
    lines = sorted(f"{name} {fact.dtype} {fact.shape} {fact.sha256}" for name, fact in facts.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
