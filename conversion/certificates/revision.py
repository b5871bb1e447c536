"""Which published revision a model folder is of, as far as it can be read from the folder. Torch-free.

Nothing in the weights says it; whoever downloaded them left it in one of four places, or nowhere. The answer names
where it was found, and is "unknown" rather than a guess: the content hash is what counts.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nano3.checkpoints.base_identity import FILE, read_base

UNKNOWN = "unknown"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHE = re.compile(r"models--(.+)")


def base_revision(folder: Path, sha256: str) -> dict[str, str]:
    """`name`, `revision` and where it was `found_in` of a model folder; `unknown` where nothing says it.

    `sha256` is the content hash of its weights: what an import recorded of others does not count.
    """
    folder = folder.resolve()
    recorded = _base_json(folder).get("sha256", sha256)
    if recorded != sha256:
        return {"name": folder.name, "revision": UNKNOWN, "found_in": f"{FILE}, which is of other weights"}
    for look in (_recorded, _cache, _download, _git):
        found = look(folder)
        if found is not None:
            return {"name": folder.name, **found}
    return {"name": folder.name, "revision": UNKNOWN}


def _base_json(folder: Path) -> dict[str, Any]:
    return dict(read_base(folder)) if (folder / FILE).is_file() else {}


def _recorded(folder: Path) -> dict[str, str] | None:
    """What the import from Hugging Face wrote into a NeMo checkpoint."""
    found = _base_json(folder).get("base")
    if found is None:
        return None
    return {key: str(found[key]) for key in ("name", "revision", "found_in") if key in found}


def _cache(folder: Path) -> dict[str, str] | None:
    """Hugging Face's cache: models--ORGANIZATION--NAME/snapshots/COMMIT."""
    repository = _CACHE.fullmatch(folder.parents[1].name) if len(folder.parents) > 1 else None
    if repository is None or folder.parent.name != "snapshots" or not _COMMIT.fullmatch(folder.name):
        return None
    return {"name": repository[1].replace("--", "/"), "revision": folder.name, "found_in": "Hugging Face cache"}


def _download(folder: Path) -> dict[str, str] | None:
    """`hf download --local-dir`: one small file for each, whose first line is the commit. All must agree."""
    files = sorted((folder / ".cache/huggingface/download").rglob("*.metadata"))
    commits = {line for file in files for line in file.read_text(errors="replace").splitlines()[:1]}
    if not commits:
        return None
    where = {"found_in": ".cache/huggingface/download"}
    commit = commits.pop()
    if commits or not _COMMIT.fullmatch(commit):
        return {"revision": UNKNOWN, "found_in": where["found_in"] + " (files of several revisions)"}
    return {"revision": commit, **where}


def _git(folder: Path) -> dict[str, str] | None:
    """A clone: the commit that HEAD names, and the repository that it was cloned from."""
    git = folder / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            name = head.removeprefix("ref: ")
            head = _loose(git / name) or _packed(git / "packed-refs", name)
    except OSError:
        return None
    if not _COMMIT.fullmatch(head):
        return None
    name = _repository(git / "config")
    return {**({"name": name} if name else {}), "revision": head, "found_in": ".git"}


def _repository(file: Path) -> str:
    """Organization and name that a clone came from; "" where its address is of another form. Never its host, before
    which credentials may stand."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        config.read(file)
        remote = urlsplit(config.get('remote "origin"', "url", fallback=""))
    except (configparser.Error, ValueError):
        return ""
    return "/".join(remote.path.strip("/").removesuffix(".git").split("/")[-2:]) if remote.scheme == "https" else ""


def _loose(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def _packed(file: Path, name: str) -> str:
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), "")
