"""`certificate.json` as data: its words, its format checked part by part, what its lines say. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversion.checkpoint.output_folder import CERTIFICATE
from conversion.checkpoint.safetensors_layout import FP8
from conversion.checkpoint.tensor_digests import Fact, Facts
from nano3.cli import UserError

FORMAT = 2
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


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of a folder; `UserError` when there is none, or it is not one of this format."""
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
    parts = ("base", "input", "output", "totals", "tools", "files", "tensors")
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
