"""`certificate.json` as data: its words, its format checked part by part, what its lines say. Reads no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversion.checkpoint.output_folder import CERTIFICATE
from conversion.checkpoint.safetensors_layout import FP8
from conversion.checkpoint.tensor_digests import Fact, Facts
from nano3.cli import UserError

FORMAT = 3
"""From 3 on a certificate has a hash of itself and says what of it can be recomputed."""
WHAT = ("identical", "changed", "cast", "quantized", "added", "dropped")
MAY = {
    "import": {"identical"},
    "export": {"identical"},
    "merge": {"identical", "changed"},
    "quantization": {"identical", "quantized", "added"},
}
"""Kind of certificate -> what may happen to a tensor. Nothing casts or drops: an expert that is gone is an error."""

BALANCE = "router=balance"
"""What changes a correction bias, where training moved those."""

SIDES = ("input", "output")

PROOF = {
    "folder": ["kind", "output", "totals", "files", "tensors", "previous"],
    "input": ["input", "base.sha256", "tensors.input", "tensors.relative_change", "tensors.relative_error"],
    "adapter": ["adapter"],
    "claimed": ["base.name", "base.revision", "base.found_in", "router", "training", "calibration", "tools"],
}
"""What `verify` recomputes which parts from: the folder itself, the model before the step, the adapter. The rest is
what the writer claims, which nobody can recompute from a model."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A certificate with the hash of itself: of everything that it says but that hash."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return {**rest, "sha256": digest}


def certificate_text(content: dict[str, Any]) -> str:
    """The one form of a certificate on disk. Any other, down to a blank, was changed since."""
    return json.dumps(content, indent=1) + "\n"


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of a folder. `UserError` when there is none, or it is not one of this format, or was changed."""
    content = parse_certificate(folder)
    if changed_since(folder, content):
        raise UserError(
            f"{folder / CERTIFICATE} is not what was written: its own hash is not that of its content; get it again"
        )
    return content


def changed_since(folder: Path, content: dict[str, Any]) -> bool:
    """Whether the certificate of a folder, whose content was parsed, is another than was written."""
    return content != sealed(content) or (folder / CERTIFICATE).read_text() != certificate_text(content)


def parse_certificate(folder: Path) -> dict[str, Any]:
    """What the certificate of a folder says, whoever wrote it; `UserError` when there is none of this format."""
    try:
        content = json.loads((folder / CERTIFICATE).read_text())
    except OSError:
        raise UserError(
            f"{folder} has no {CERTIFICATE}; it was not written by this project, or the file was lost"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / CERTIFICATE} is not valid JSON ({error}); get it again") from None
    if not _well_formed(content):
        raise UserError(
            f"{folder / CERTIFICATE} is not of format {FORMAT}; use the version of this project that wrote it"
        )
    return content


def _well_formed(content: Any) -> bool:
    """Whether a certificate has every part that is read; it may be anybody's file."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return False
    parts = ("base", "input", "output", "totals", "tools", "files", "tensors", "proof")
    if not all(isinstance(content.get(name), dict) for name in parts) or content.get("kind") not in MAY:
        return False
    hashes = all(isinstance(content[name].get("sha256"), str) for name in ("base", *SIDES))
    lines = hashes and all(
        isinstance(line, dict)
        and isinstance(line.get("what"), str)
        and any(side in line for side in SIDES)
        and all(_is_fact(line[side]) for side in SIDES if side in line)
        for line in content["tensors"].values()
    )
    return lines and "previous" in content and (content["previous"] is None or _well_formed(content["previous"]))


def _is_fact(said: Any) -> bool:
    return (
        isinstance(said, dict)
        and isinstance(said.get("dtype"), str)
        and isinstance(said.get("sha256"), str)
        and isinstance(said.get("shape"), list)
    )


def chain(certificate: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A certificate and those before it, the newest first."""
    link: dict[str, Any] | None = certificate
    while link is not None:
        yield link
        link = link["previous"]


def said(link: dict[str, Any], side: str) -> Facts:
    """What a certificate says of all tensors of one side, input or output."""
    lines = {name: line[side] for name, line in link["tensors"].items() if side in line}
    return {name: Fact(line["dtype"], tuple(line["shape"]), line["sha256"]) for name, line in lines.items()}


def count_lines(tensors: dict[str, Any]) -> dict[str, int]:
    """How often each word of `WHAT` is true of a certificate's lines."""
    words = [happened(line) for line in tensors.values()]
    return {what: words.count(what) for what in WHAT}


def happened(line: dict[str, Any]) -> str:
    """What a line's two sides say that happened to the tensor."""
    if "output" not in line:
        return "dropped"
    if "input" not in line:
        return "added"
    if line["input"] == line["output"]:
        return "identical"
    if line["input"]["dtype"] == line["output"]["dtype"]:
        return "changed"
    return "quantized" if line["output"]["dtype"] == FP8 else "cast"
