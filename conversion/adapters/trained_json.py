"""`trained.json` in an adapter folder of recipes/qwen3_qlora.py: what the adapter was trained on. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from nano3.documents import Count, Sha256, read_json

TRAINED = "trained.json"


class Trained(TypedDict):
    """The base by its content hash, what its linear layers were in (None: 16 bit), and the steps until then."""

    base_sha256: Sha256
    base_quantization: Literal["nf4"] | None
    steps: NotRequired[Count]


def read_trained(folder: Path) -> Trained | None:
    """What an adapter says of its training; None of one that another tool wrote."""
    path = folder / TRAINED
    return read_json(path, Trained, "copy the adapter again") if path.is_file() else None
