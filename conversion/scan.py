"""The first pass over a model that is to be changed: every tensor is hashed and checked before one is written."""

from __future__ import annotations

import hashlib

from conversion.folders import progress
from conversion.identity import Fact
from conversion.magnitude import largest_magnitude, refuse_not_finite
from conversion.parallel import in_parallel, scratch
from conversion.safetensors_io import HFFolder
from conversion.safetensors_writer import PIECE


def scan(hf: HFFolder) -> tuple[dict[str, Fact], dict[str, float]]:
    """Facts and largest magnitude of every tensor, by name; with a progress bar on stderr.

    Raises `UserError` naming a tensor with NaN or infinity.
    """
    entries = hf.layout.entries
    facts: dict[str, Fact] = {}
    largest = dict.fromkeys(entries, 0.0)

    def do(name: str) -> None:
        entry, digest = entries[name], hashlib.sha256()
        size = entry.stop - entry.start
        for begin in range(0, size, PIECE):
            piece = scratch(min(PIECE, size - begin))
            hf.read_into(piece, name, begin)
            found = largest_magnitude(piece, entry.dtype)
            refuse_not_finite(found, name, hf.path)
            largest[name] = max(largest[name], found)
            digest.update(piece)
            bar.update(len(piece))
        facts[name] = Fact(entry.dtype, entry.shape, digest.hexdigest())

    with progress(hf.layout.total_bytes, "check") as bar:
        in_parallel(sorted(entries, key=lambda name: (entries[name].file, entries[name].start)), do)
    return {name: facts[name] for name in entries}, largest
