"""Which base model a NeMo checkpoint holds: the content hash that the import from Hugging Face wrote beside it.

`conversion/identity.py` computes the hash. It depends on the tensors only, not on the files that they came in.
Imports neither torch nor NeMo.
"""

from __future__ import annotations

import json
from pathlib import Path

from nano3.cli import UserError

FILE = "base.json"
"""In a NeMo checkpoint: the SHA-256 over the base's tensors, and the files that it was read from."""


def recorded_sha256(checkpoint: Path) -> str:
    """The content hash of the base weights in a NeMo checkpoint. `UserError` when the import recorded none."""
    try:
        return json.loads((checkpoint / FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{checkpoint} does not say which base model it holds (no readable {FILE}); import it again with "
            "conversion/hf_to_nemo.py"
        ) from None
