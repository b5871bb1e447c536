"""Which base model a NeMo checkpoint holds: the content hash that the import from Hugging Face wrote beside it.

`conversion/identity.py` computes the hash. It depends on the tensors only, not on the files that they came in.
Imports neither torch nor NeMo.
"""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import FileName, Name, Sha256, Text, read_json

FILE = "base.json"
"""In a NeMo checkpoint: the SHA-256 over the base's tensors, and the files that it was read from."""


_REMEDY = "import it again with conversion/hf_to_nemo.py"


class Origin(TypedDict):
    """Which published model the tensors are (conversion/certificates/certificate.py)."""

    name: Name
    revision: Name
    found_in: NotRequired[Name]


class Base(TypedDict):
    """base.json."""

    sha256: Sha256
    base: NotRequired[Origin]
    source: NotRequired[Text]
    files: NotRequired[dict[FileName, list[int]]]


def recorded_sha256(checkpoint: Path) -> str:
    """The content hash of the base weights in a NeMo checkpoint. `UserError` when the import recorded none."""
    if not (checkpoint / FILE).is_file():
        raise UserError(f"{checkpoint} does not say which base model it holds (no {FILE}); {_REMEDY}")
    return read_base(checkpoint)["sha256"]


def read_base(checkpoint: Path) -> Base:
    """What the import wrote. Raises `UserError` for a file that is missing or not as it must be."""
    return read_json(checkpoint / FILE, Base, _REMEDY)
