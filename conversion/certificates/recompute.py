"""The numbers of a certificate from the tensors themselves: scales, sizes of changes, errors of FP8."""

from __future__ import annotations

import math
from typing import Any

from conversion.certificates.certificate import norm_ratio
from conversion.checkpoint.model_folder import TensorFolder
from conversion.checkpoint.output_folder import progress
from conversion.checkpoint.pieces import row_steps

TOLERANCE = 1e-3
"""Relative: sums of squares in FP32, piece by piece, depend a little on how the pieces are cut."""


def wrong_scales(hf: TensorFolder, certificate: dict[str, Any]) -> list[str]:
    """Quantized tensors whose scale on disk is not the one that the certificate names."""
    problems = []
    for name, line in certificate["tensors"].items():
        if line["what"] == "quantized" and f"{name}_scale" in hf.layout.entries:
            scale = float(hf.rows(f"{name}_scale", 0, 1).view(-1)[0])
            if line.get("scale") != scale:
                problems.append(f"{name} has the scale {scale}, and the certificate says {line.get('scale')}")
    return problems


def wrong_numbers(made: TensorFolder, base: TensorFolder, certificate: dict[str, Any]) -> list[str]:
    """Relative changes and errors that are not what the two models give."""
    words = {"changed": "relative_change", "quantized": "relative_error"}
    lines = {name: line for name, line in certificate["tensors"].items() if line["what"] in words}
    problems = []
    with progress(sum(_size(base, name) for name in lines), "compare") as bar:
        for name, line in lines.items():
            word = words[line["what"]]
            told, found = line.get(word), _distance(made, base, name)
            if not _close(told, found):
                problems.append(f"{name}: {word} is {found}, and the certificate says {told}")
            bar.update(_size(base, name))
    return problems


def _distance(made: TensorFolder, base: TensorFolder, name: str) -> float | None:
    """Norm of the difference over the norm in `base`; of FP8 codes, times their scale."""
    scale = float(made.rows(f"{name}_scale", 0, 1).view(-1)[0]) if f"{name}_scale" in made.layout.entries else 1.0
    part = whole = 0.0
    entry = base.layout.entries[name]
    for start, count in row_steps(entry.rows, 4 * entry.row_bytes):
        old, new = base.rows(name, start, count).float(), made.rows(name, start, count).float()
        part += float((new * scale - old).square().sum())
        whole += float(old.square().sum())
    return norm_ratio(part, whole)


def _close(told: Any, found: float | None) -> bool:
    if told is None or found is None:
        return told is found
    return isinstance(told, float | int) and math.isclose(told, found, rel_tol=TOLERANCE)


def _size(model: TensorFolder, name: str) -> int:
    entry = model.layout.entries[name]
    return entry.stop - entry.start
