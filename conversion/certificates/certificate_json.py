"""`certificate.json` as data: its words, its format checked part by part, what its lines say. Reads no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required

from annotated_types import MaxLen, MinLen
from typing_extensions import TypedDict

from conversion.checkpoint.output_folder import CERTIFICATE
from conversion.checkpoint.safetensors_layout import FP8
from conversion.checkpoint.tensor_digests import Fact, Facts
from nano3.checkpoints.base_identity import Origin
from nano3.cli import UserError
from nano3.documents import (
    AboveZero,
    Count,
    Finite,
    InnerPath,
    Name,
    NotNegative,
    Positive,
    Sha256,
    Shape,
    check,
    read_json,
)

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

UNKNOWN = "unknown"
"""What a base's revision is said to be where nothing says it."""

BALANCE = "router=balance"
"""What changes a correction bias, where training moved those."""
DEQUANTIZED = "base=dequantized"
"""What changes every frozen linear layer, where an adapter is merged onto the 4-bit weights that it was trained on."""

SIDES = ("input", "output")
_REMEDY = "get the folder again from who made it"


class TensorFact(TypedDict):
    """A tensor before or after a step."""

    dtype: Name
    shape: Shape
    sha256: Sha256


class Line(TypedDict, total=False):
    """What happened to a tensor."""

    what: Required[Name]
    input: TensorFact
    output: TensorFact
    by: list[Name]
    relative_change: NotNegative | None
    relative_error: NotNegative | None
    scale: AboveZero


class SideFacts(TypedDict):
    """All tensors before or after a step."""

    sha256: Sha256
    tensors: Count


class BaseFacts(Origin):
    """The published model that a chain of steps began with."""

    sha256: Sha256


class Parent(TypedDict):
    """One of the adapters that a combined adapter was made from."""

    name: Name
    sha256: Sha256
    weight: Finite
    combined: NotRequired[CombinedFacts | None]


class CombinedFacts(TypedDict):
    """How an adapter was made from others (conversion/combine_adapters.py), each with the hash of its folder."""

    method: Name
    density: Finite
    seed: Count
    largest_error: NotNegative
    parents: Annotated[list[Parent], MinLen(1), MaxLen(1000)]


class AdapterFacts(TypedDict, total=False):
    """The adapter of a merge."""

    sha256: Sha256
    rank: Positive
    alpha: AboveZero
    targets: list[Name]
    experts: Name
    rslora: bool
    dora: bool
    base_quantization: Literal["nf4"]
    modules: list[Name]
    combined: CombinedFacts | None


class DataFacts(TypedDict):
    """The data of a training run."""

    name: Name
    documents: NotRequired[Count]
    tokens: NotRequired[Count]
    supervised_tokens: NotRequired[Count]
    sources: NotRequired[list[Name]]


class TrainingSettings(TypedDict, total=False):
    """The settings that a card tells of; the other groups are there too."""

    train: dict[Name, Any]


class TrainingFacts(TypedDict, total=False):
    """The run that wrote the adapter of a merge."""

    steps: Count
    data: DataFacts
    settings: TrainingSettings
    ranks: Positive


class CalibrationFacts(TypedDict, total=False):
    """How the scales of a quantization were found."""

    selection: list[Name]
    kv_cache: bool
    tokens: Count


class Certificate(TypedDict):
    """certificate.json: one step, and the certificate of the step before it."""

    format: Literal[3]
    sha256: Sha256
    proof: dict[Name, list[Name]]
    kind: Literal["import", "export", "merge", "quantization"]
    base: BaseFacts
    input: SideFacts
    output: SideFacts
    totals: dict[Name, Count]
    tools: dict[Name, Name]
    files: dict[InnerPath, Sha256]
    tensors: dict[Name, Line]
    adapter: NotRequired[AdapterFacts]
    training: NotRequired[TrainingFacts]
    calibration: NotRequired[CalibrationFacts]
    router: NotRequired[Literal["frozen", "balance"]]
    merged_onto: NotRequired[Literal["original", "dequantized"]]
    not_tuned: NotRequired[list[Name]]
    """Tensors of multi-token prediction, which no step may change."""
    previous: Certificate | None


PROOF = {
    "folder": ["kind", "output", "totals", "files", "tensors", "previous"],
    "input": ["input", "base.sha256", "tensors.input", "tensors.relative_change", "tensors.relative_error"],
    "adapter": ["adapter"],
    "claimed": [
        "base.name",
        "base.revision",
        "base.found_in",
        "router",
        "merged_onto",
        "training",
        "calibration",
        "tools",
    ],
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
    path = folder / CERTIFICATE
    if not path.is_file():
        raise UserError(f"{folder} has no {CERTIFICATE}; it was not written by this project, or the file was lost")
    content = read_json(path, dict[str, Any], _REMEDY)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}; use the version of this project that wrote it")
    check(content, Certificate, str(path), _REMEDY)
    for link in chain(content):
        for name, line in link["tensors"].items():
            if not any(side in line for side in SIDES):
                raise UserError(f"{path}: tensors.{name} has neither input nor output; {_REMEDY}")
    return content


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
