"""The seal of a folder that we write: `files.json` has size and SHA-256 of every file, and a hash of itself.

Whoever reads the folder checks it first (`check_seal`). A file that changed, was cut short or is gone is a `UserError`,
and so is a seal that changed. Files that did not change since they were last checked are not read again
(nano3/file_digests.py). Files that came later are no part of it: a certificate, where there is one, speaks of those.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from nano3.documents import Count, InnerPath, Name, Sha256, parse_json, read_bytes, read_json
from nano3.errors import UserError
from nano3.file_digests import remembered_sha256
from nano3.file_system import LOCK, is_transient, unique

MARKER = "nano3.json"
"""File that says a folder was written by this project, and by which of its tools."""
SEAL = "files.json"
FORMAT = 2
"""Of the seal. Format 1 had sizes only."""
PROSE = ("README.md", "model_card.md")
"""Files for people, which people edit and no tool reads."""


class Marker(TypedDict):
    """nano3.json."""

    kind: Name
    sealed: NotRequired[bool]


class SealLine(TypedDict):
    """What the seal says of a file."""

    bytes: Count
    sha256: Sha256


class Seal(TypedDict):
    """files.json."""

    format: Literal[2]
    files: dict[InnerPath, SealLine]
    sha256: Sha256


def owner_of(folder: Path) -> str | None:
    """The kind of a folder that this project wrote, or None when it is not ours."""
    return _marker(folder).get("kind")


def mark(folder: Path, kind: str, sealed: bool = False) -> None:
    """Writes `nano3.json`: the folder is ours, of this kind, and has a seal or not. No kill leaves half of it."""
    marker = {"kind": kind, "format": 2, "sealed": sealed}
    if _marker(folder) != marker:
        new = folder / f".{MARKER}.partial-{unique()}"
        new.write_text(json.dumps(marker) + "\n")
        os.replace(new, folder / MARKER)


def is_ours(folder: Path, kind: str | None = None) -> bool:
    """Whether a folder has our marker, of `kind` if one is given, or nothing yet: who made it was killed before the
    marker was there."""
    # In this order: another process may mark it meanwhile.
    nothing_yet = all(path.name in (LOCK, "lost+found") or _is_new_marker(path) for path in folder.iterdir())
    owner = owner_of(folder)
    return nothing_yet if owner is None else kind in (None, owner)


def _is_new_marker(path: Path) -> bool:
    """Whether it is a marker that had not got its name when its writer was killed."""
    return path.name.startswith(f".{MARKER}.") and is_transient(path.name)


def seal(folder: Path, names: Mapping[str, str] | None = None, leave_out: str = "") -> None:
    """Writes the seal over every file that the folder holds now, but for `PROSE` and folders with a seal of their own.

    Args:
        folder: what is about to get its name.
        names: how files that are still hidden will be called: name now -> name then.
        leave_out: a folder in it that goes before it gets its name.
    """
    for left in [path for path in folder.iterdir() if _is_new_marker(path)]:
        left.unlink()
    kind = owner_of(folder)
    if kind is not None:
        mark(folder, kind, sealed=True)
    files = {path: str(path.relative_to(folder)) for path in _files(folder)}
    files = {path: name for path, name in files.items() if leave_out not in Path(name).parts}
    digests = remembered_sha256(files)
    lines = {
        (names or {}).get(name, name): {"bytes": path.stat().st_size, "sha256": digests[path]}
        for path, name in files.items()
    }
    (folder / SEAL).write_text(_text(lines))


def check_seal(folder: Path, required: bool = False) -> None:
    """Raises `UserError` for a file that is not what the seal of the folder says.

    A folder without a seal passes, as other tools write none, unless it is `required` or the folder's marker promises
    one. Links that lead out of a folder are refused in any (`require_inside`), but for hidden folders such as `.git`.
    """
    for path in folder.rglob("*"):
        plain = (path.is_file() or path.is_dir()) and not path.is_symlink()
        if not plain and not path.relative_to(folder).parts[0].startswith("."):
            require_inside(folder, path)
    lines = sealed(folder)
    if lines is None:
        if required or _marker(folder).get("sealed"):
            raise UserError(f"{folder / SEAL}, which says what the folder holds, is missing; {_remedy(folder)}")
        return
    paths = {folder / name: line for name, line in lines.items()}
    for path, line in paths.items():
        require_inside(folder, path)
        if not path.is_file():
            raise UserError(f"{path} is missing; {_remedy(folder)}")
        if path.stat().st_size != line["bytes"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes and should have {line['bytes']}: it is truncated or changed; "
                f"{_remedy(folder)}"
            )
    other = _unlike(paths, remembered_sha256(paths))
    # What was remembered may speak for a file, never against it.
    for path in other and _unlike(paths, remembered_sha256(other, anew=True)):
        raise UserError(f"{path} is not what was written: its SHA-256 is not that of {SEAL}; {_remedy(folder)}")


def sealed(folder: Path) -> dict[str, SealLine] | None:
    """Name -> `bytes` and `sha256` of the files that a folder was written with; None for a folder without a seal.

    Raises:
        UserError: the seal is damaged, or of another format.
    """
    path = folder / SEAL
    if not path.exists():
        return None
    try:
        data = read_bytes(path, _remedy(folder))
        lines = parse_json(data, Seal, str(path))["files"]
        whole = data == _text(lines).encode()
    except UserError:
        whole = False
    if not whole:
        raise UserError(
            f"{path} is damaged, changed, or of a format before {FORMAT}, which had no hashes; {_remedy(folder)}"
        )
    return lines


def came_later(folder: Path) -> list[str]:
    """Files in a folder of ours that it was not written with, but for `PROSE`, folders with a seal of their own, and
    what a killed writer of one of them left; none where no seal can tell."""
    try:
        lines = sealed(folder)
    except UserError:
        return []
    later = [path for path in _files(folder) if str(path.relative_to(folder)) not in lines] if lines else []
    return [str(path.relative_to(folder)) for path in later if not _is_left(path, folder)]


def _is_left(path: Path, folder: Path) -> bool:
    """Whether a file below a folder is what a killed writer left: an empty lock, or of an unfinished output."""
    unfinished = any(is_transient(part) for part in path.parent.relative_to(folder).parts)
    return unfinished or (is_transient(path.name) and (not path.name.endswith(".lock") or not path.stat().st_size))


def require_inside(folder: Path, path: Path) -> None:
    """Raises `UserError` for a path of a model folder that leads out of it through a symbolic link, or that is no file
    (a pipe would never end).

    Hugging Face's cache is laid out so: files in `snapshots/COMMIT` are links into `blobs` beside it.
    """
    real, root = path.resolve(), folder.resolve()
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise UserError(f"{path} is no plain file; put the file itself there, or remove it")
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else None
    if root not in real.parents and (blobs is None or blobs not in real.parents):
        raise UserError(
            f"{path} is a link to {real}, outside of {folder}; put the file itself there, or remove the link"
        )


def _files(folder: Path) -> list[Path]:
    inner = {marker.parent for marker in folder.rglob(MARKER)} - {folder}
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and str(path.relative_to(folder)) not in (SEAL, *PROSE) and inner.isdisjoint(path.parents)
    ]


def _text(lines: Mapping[str, Any]) -> str:
    """The seal's one form. Any other, down to a blank, is a changed seal."""
    digest = hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": FORMAT, "files": lines, "sha256": digest}, indent=1) + "\n"


def _unlike(lines: Mapping[Path, Any], found: Mapping[Path, str]) -> list[Path]:
    return [path for path, digest in found.items() if lines[path]["sha256"] != digest]


def _marker(folder: Path) -> dict[str, Any]:
    """What `nano3.json` says; {} of a folder without one, or with one that says nothing."""
    try:
        return dict(read_json(folder / MARKER, Marker))
    except UserError:
        return {}


def _remedy(folder: Path) -> str:
    if (folder / "lora.json").is_file():
        return (
            "copy the folder again from where it was written, or, if you changed it on purpose, say so: "
            f"python conversion/adapter.py accept {folder}"
        )
    if (folder / "packs.json").is_file():
        return f"pack the store again: python data_prep/repack.py {folder.parent} --seq-length N"
    return "copy the folder again from where it was written, or write it again"
