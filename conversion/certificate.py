"""The certificate of a checkpoint: for every tensor what it was, what it is, and what happened in between.

`certificate.json` lies beside the weights. A tensor is `identical` (the same bytes), `changed` (by an adapter, with the
relative size of the change), `quantized` (with its scale and relative error), `added` (a scale) or `dropped`; there is
no other way, and a difference that nobody declared is not certified. It names its input and the adapter by content hash
(conversion/identity.py), so that whoever receives the model can recompute every line of it (conversion/certify.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conversion.folders import CERTIFICATE
from conversion.identity import combine, tensor_digests
from conversion.layout import FP8
from conversion.safetensors_io import HFFolder
from nano3.cli import UserError

FORMAT = 1
WHAT = ("identical", "changed", "quantized", "added", "dropped")
_TOOLS = ("nano3-lora", "torch", "safetensors", "megatron-core", "nvidia-modelopt")


@dataclass
class Work:
    """What a tool declares about its output before it is certified.

    Args:
        kind: merge or quantization.
        changes: tensor -> facts about a declared change: `by` (what changed it), and `relative_change` (a norm over
            the norm of the input) or `scale` and `relative_error`.
        facts: about the whole, such as the adapter and its hash.
    """

    kind: str
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def write_certificate(source: HFFolder, before: dict[str, str], out: Path, work: Work) -> dict[str, Any]:
    """Hashes the output, compares it with the input's digests `before`, writes and returns `out/certificate.json`.

    Raises `UserError` when a tensor differs that `work` does not declare: the output would not be what it says.
    """
    with HFFolder(out, quantized=True) as target:
        after = tensor_digests(target)
        tensors = {
            name: _line(name, source, target, before, after, work) for name in sorted(before.keys() | after.keys())
        }
    content = {
        "format": FORMAT,
        "kind": work.kind,
        "input": {"sha256": combine(source, before), "tensors": len(before)},
        "output": {"sha256": combine(target, after), "tensors": len(after)},
        **work.facts,
        "totals": {what: sum(line["what"] == what for line in tensors.values()) for what in WHAT},
        "tools": {name: found for name in _TOOLS if (found := _version(name))},
        "tensors": tensors,
    }
    (out / CERTIFICATE).write_text(json.dumps(content, indent=1) + "\n")
    return content


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a small folder, an adapter's."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def norm_ratio(part: float, whole: float) -> float | None:
    """sqrt(part / whole) of two sums of squares; None where there is nothing to compare with."""
    return math.sqrt(part / whole) if whole else None


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
    parts = all(isinstance(content.get(name), dict) for name in ("input", "output", "totals", "tools", "tensors"))
    if not parts or not isinstance(content.get("kind"), str):
        return False
    hashes = all(isinstance(content[side].get("sha256"), str) for side in ("input", "output"))
    sides = ("input", "output")
    return hashes and all(
        isinstance(line, dict)
        and isinstance(line.get("what"), str)
        and any(side in line for side in sides)
        and all(isinstance(line[side], dict) for side in sides if side in line)
        and all("dtype" in line[side] for side in sides if side in line)
        for line in content["tensors"].values()
    )


def _line(
    name: str, source: HFFolder, target: HFFolder, before: dict[str, str], after: dict[str, str], work: Work
) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for side, folder, digests in (("input", source, before), ("output", target, after)):
        if name in digests:
            entry = folder.layout.entries[name]
            line[side] = {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": digests[name]}
    what = happened(line)
    if what not in ("changed", "quantized"):
        return {"what": what, **line}
    if name not in work.changes:
        raise UserError(f"{name} differs from the input, and nothing was to change it: this is a bug, report it")
    return {"what": what, **line, **work.changes[name]}


def happened(line: dict[str, Any]) -> str:
    """What a line's two sides say that happened to the tensor."""
    if "output" not in line:
        return "dropped"
    if "input" not in line:
        return "added"
    if line["input"] == line["output"]:
        return "identical"
    return "quantized" if line["output"]["dtype"] == FP8 else "changed"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
