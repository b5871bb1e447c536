"""The certificate of a checkpoint: for every tensor what it was, what it is, and what happened in between.

`certificate.json` lies beside the weights of every folder that is converted, merged or quantized, Hugging Face's or
NeMo's; tensors have Hugging Face's names in both. A tensor is `identical` (the same bytes), `changed` (by an adapter,
with the relative size of the change), `cast`, `quantized` (with its scale and relative error), `added` (a scale) or
`dropped`; there is no other way, and a difference that nobody declared is not certified. Input, base and adapter are
named by content hash, the certificate of the input travels inside (`previous`), so whoever
receives the model can recompute it back to the published base (conversion/certify.py).

A tool that writes a folder calls, inside `fresh_output` and last of all:

    write_certificate(folder, source, before, after, Claim("import"))

`before` and `after` are the facts of all tensors of input and output. Who streams has them from
the same pass: `scan` of the input, `facts` of the writer. What is copied from one buffer needs one digest: the same
facts twice.
`previous_certificate(source, before)` says early whether the input still is what its own certificate says.
"""

from __future__ import annotations

import configparser
import hashlib
import math
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conversion.certificates.certificate_json import (
    FORMAT,
    MAY,
    PROOF,
    SIDES,
    UNKNOWN,
    certificate_text,
    count_lines,
    happened,
    read_certificate,
    sealed,
)
from conversion.certificates.model_card import model_card, read_readme
from conversion.checkpoint.model_folder import side_files
from conversion.checkpoint.output_folder import CARD, CERTIFICATE, PART, side_folder
from conversion.checkpoint.tensor_digests import Facts, content_hash
from nano3.arch import MTP
from nano3.checkpoints.base_identity import FILE, read_base
from nano3.cli import UserError
from nano3.documents import as_json
from nano3.file_digests import file_sha256

_TOOLS = ("nano3-lora", "torch", "safetensors", "megatron-core", "nvidia-modelopt")


@dataclass
class Claim:
    """What a tool declares about its output before it is certified.

    Args:
        kind: a key of `MAY`.
        changes: tensor -> facts about a declared change: `by` (modules that changed it) and `relative_change` (a norm
            over the norm of the input), or `scale` and `relative_error`.
        facts: about the whole, such as the adapter and its hash.
    """

    kind: str
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def write_certificate(out: Path, source: Path, before: Facts, after: Facts, claim: Claim) -> dict[str, Any]:
    """Writes `out/certificate.json`, which it returns, and the card for people.

    `before` are the tensors of the folder `source`, `after` those of `out`.

    Raises `UserError` when a tensor differs in a way that `claim` does not declare, as the output would not be what it
    says, and when `source` is no longer what its own certificate says.
    """
    previous = previous_certificate(source, before)
    tensors = {name: _line(name, before, after, claim) for name in sorted(before.keys() | after.keys())}
    found = content_hash(before)
    content = {
        "format": FORMAT,
        "kind": claim.kind,
        "base": previous["base"] if previous else {"sha256": found, **base_revision(source, found)},
        "input": {"sha256": found, "tensors": len(before)},
        "output": {"sha256": content_hash(after), "tensors": len(after)},
        **claim.facts,
        "totals": count_lines(tensors),
        "tools": {name: release for name in _TOOLS if (release := _version(name))},
        "files": side_digests(out),
        "tensors": tensors,
        "proof": PROOF,
        "previous": previous,
    }
    carried = [name for name in tensors if name.startswith(MTP)]
    if carried:
        content["not_tuned"] = carried
    content = sealed(as_json(content))
    (out / CERTIFICATE).write_text(certificate_text(content))
    (out / CARD).write_text(model_card(content, read_readme(out)))
    return content


def previous_certificate(source: Path, facts: Facts) -> dict[str, Any] | None:
    """The certificate of an input folder, None where it has none. `facts` are its tensors as they are now.

    Raises `UserError` when they are not those that it certifies.
    """
    if not (source / CERTIFICATE).is_file():
        return None
    content = read_certificate(source)
    if content["output"]["sha256"] != content_hash(facts):
        raise UserError(
            f"{source} is not what its {CERTIFICATE} says: python conversion/certify.py verify names the tensors; "
            "get it again, or remove the certificate to begin a new one here"
        )
    return content


def side_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what tells readers how to use the tensors: config.json, tokenizer, template, whatever lies beside.

    Not README.md: the base's gives way to the model card when the folder is uploaded. Nor weights that are hidden until
    the folder is complete.
    """
    side = side_folder(folder)
    names = {str(path) for path in side_files(side)} - {"README.md"}
    return {name: file_sha256(side / name) for name in sorted(names) if not name.endswith(PART)}


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a folder, an adapter's."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def norm_ratio(part: float, whole: float) -> float | None:
    """sqrt(part / whole) of two sums of squares; None where there is nothing to compare with."""
    return math.sqrt(part / whole) if whole else None


def _line(name: str, before: Facts, after: Facts, claim: Claim) -> dict[str, Any]:
    line: dict[str, Any] = {
        side: facts[name].to_json() for side, facts in zip(SIDES, (before, after), strict=True) if name in facts
    }
    what = happened(line)
    if what not in MAY[claim.kind]:
        raise UserError(f"{name} was {what}, which no {claim.kind} does: this is a bug, report it")
    if what in ("identical", "added"):
        return {"what": what, **line}
    if name not in claim.changes:
        raise UserError(f"{name} differs from the input, and nothing was to change it: this is a bug, report it")
    return {"what": what, **line, **claim.changes[name]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
