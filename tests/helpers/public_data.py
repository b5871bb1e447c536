"""Questions of public data sets, out of packages that `make build/reference/data` fetches; for tests only."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "build" / "reference" / "data"


def unpacked(package: str, member: str, folder: Path) -> Path:
    """A file of a package, written into `folder`; without the package the test is skipped, and fails in CI."""
    found = sorted(PACKAGES.glob(f"{package}-*.whl"))
    if not found:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"no {package} in {PACKAGES}: run `make build/reference/data`")
    with zipfile.ZipFile(found[-1]) as archive:
        path = folder / Path(member).name
        path.write_bytes(archive.read(member))
    return path
