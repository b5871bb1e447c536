"""Passes over a whole model on all cores: every tensor hashed, and checked before one is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from conversion.checkpoint.folders import progress
from conversion.checkpoint.magnitude import largest_magnitude, refuse_not_finite
from conversion.checkpoint.model_folder import ModelFolder
from conversion.checkpoint.parallel import in_parallel, scratch
from conversion.checkpoint.plan import row_steps
from conversion.checkpoint.safetensors_writer import PIECE
from conversion.checkpoint.tensor_digests import Fact


def facts_of(model: ModelFolder) -> dict[str, Fact]:
    """The facts of every tensor by name, with a progress bar on stderr."""
    return _hash(model, "hash", lambda _name, _piece: None)


def scan(model: ModelFolder) -> tuple[dict[str, Fact], dict[str, float]]:
    """Facts and largest magnitude of every tensor, by name; with a progress bar on stderr.

    Raises `UserError` naming a tensor with NaN or infinity.
    """
    largest = dict.fromkeys(model.layout.entries, 0.0)

    def see(name: str, piece: memoryview) -> None:
        found = largest_magnitude(piece, model.layout.entries[name].dtype)
        refuse_not_finite(found, name, model.path)
        largest[name] = max(largest[name], found)

    return _hash(model, "check", see), largest


def _hash(model: ModelFolder, what: str, see: Callable[[str, memoryview], Any]) -> dict[str, Fact]:
    """Reads every tensor in pieces of whole rows, in order on one thread; `see` is shown each piece."""
    entries = model.layout.entries
    facts: dict[str, Fact] = {}

    def do(name: str) -> None:
        entry, digest = entries[name], hashlib.sha256()
        for start, count in row_steps(entry.rows, entry.row_bytes, PIECE):
            piece = scratch(count * entry.row_bytes)
            model.read_into(piece, name, start * entry.row_bytes)
            see(name, piece)
            digest.update(piece)
            bar.update(len(piece))
        facts[name] = Fact(entry.dtype, entry.shape, digest.hexdigest())

    with progress(model.layout.total_bytes, what) as bar:
        in_parallel(sorted(entries, key=lambda name: (entries[name].file, entries[name].start)), do)
    return {name: facts[name] for name in entries}
