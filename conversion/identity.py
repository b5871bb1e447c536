"""The content hash of a base model: SHA-256 over all tensors of a Hugging Face folder, however they lie in files.

    python conversion/identity.py MODEL

Each tensor has the SHA-256 of its bytes; the hash is the SHA-256 over the lines `name dtype shape digest`, sorted. The
import records it in the NeMo checkpoint (`base.json`), training passes it on to every adapter and checkpoint, and a
merge compares it with the base that it is given. Tensors are read in pieces, on several threads (hashlib lets them run
at once), so a 63 GB model costs one pass over its files and no memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.folders import progress
from conversion.layout import Entry, TensorTable
from conversion.revision import base_revision
from conversion.safetensors_io import HFFolder
from nano3.arch import resolve_model
from nano3.base_identity import FILE
from nano3.cli import UserError, run

if TYPE_CHECKING:
    import torch

PIECE = 16 << 20
"""Bytes read at once by a thread."""
THREADS = 8


@dataclass(frozen=True)
class Fact:
    """What one tensor is: dtype in safetensors' word, shape, SHA-256 of its bytes in row order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As certificates say it."""
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


Facts = Mapping[str, Fact]
"""Hugging Face tensor name -> what it is. The same for a NeMo checkpoint, whose tensors are named as there."""


class RowDigests:
    """The facts of tensors whose rows pass by while they are read or written, so that no second pass is needed.

    Rows of one tensor must come in their order and from one thread at a time; tensors may alternate, and different
    ones may come from different threads.
    """

    def __init__(self, table: TensorTable) -> None:
        self.table = table
        self._digests = {name: hashlib.sha256() for name in table}
        self._rows = dict.fromkeys(table, 0)

    def update(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Takes rows `start` and following of the tensor `name`, in its dtype."""
        assert start == self._rows[name], (name, start, self._rows[name])
        self._rows[name] += len(rows)
        self._digests[name].update(raw_bytes(rows))

    def facts(self) -> dict[str, Fact]:
        """The facts of all tensors, once every row has passed."""
        for name, (_, shape) in self.table.items():
            assert self._rows[name] == (shape[0] if shape else 1), f"{name}: {self._rows[name]} rows of {shape} passed"
        return {
            name: Fact(dtype, tuple(shape), self._digests[name].hexdigest())
            for name, (dtype, shape) in self.table.items()
        }


def raw_bytes(rows: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a safetensors file."""
    import torch

    array: Any = rows.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def content_hash(facts: Facts) -> str:
    """The content hash of a model from the facts of all its tensors."""
    lines = sorted(f"{name} {fact.dtype} {fact.shape} {fact.sha256}" for name, fact in facts.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hf_facts(hf: HFFolder) -> dict[str, Fact]:
    """The facts of all tensors of a Hugging Face folder, with a progress bar on stderr."""
    entries = hf.layout.entries
    files = {name: os.open(hf.path / name, os.O_RDONLY) for name in {entry.file for entry in entries.values()}}
    try:
        with progress(hf.layout.total_bytes, "hash") as bar, ThreadPoolExecutor(THREADS) as threads:
            jobs = {
                name: threads.submit(_digest, hf.path, files[entry.file], entry, bar) for name, entry in entries.items()
            }
            return {name: Fact(entry.dtype, entry.shape, jobs[name].result()) for name, entry in entries.items()}
    finally:
        for file in files.values():
            os.close(file)


def _digest(folder: Path, file: int, entry: Entry, bar: Any) -> str:
    digest, position = hashlib.sha256(), entry.start
    while position < entry.stop:
        piece = os.pread(file, min(PIECE, entry.stop - position), position)
        if not piece:
            raise UserError(f"{folder / entry.file} ended while it was read; it changed under our hands")
        digest.update(piece)
        position += len(piece)
        bar.update(len(piece))
    return digest.hexdigest()


def source_files(hf: HFFolder) -> dict[str, list[int]]:
    """Name -> (bytes, time of last change in ns) of the weight files: a cheap answer to "are they still the same?"."""
    stats = {name: (hf.path / name).stat() for name in sorted({entry.file for entry in hf.layout.entries.values()})}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def record(hf: HFFolder, facts: Facts, checkpoint: Path) -> None:
    """Writes `base.json` into a NeMo checkpoint that is made from `hf`, whose tensors have `facts`."""
    content = {
        "sha256": content_hash(facts),
        "source": str(hf.path.resolve()),
        "files": source_files(hf),
        "base": base_revision(hf.path),
    }
    (checkpoint / FILE).write_text(json.dumps(content, indent=1) + "\n")


def holds(checkpoint: Path, source: Path) -> bool:
    """Whether a NeMo checkpoint was made from the Hugging Face folder `source`, whose files have not changed since."""
    try:
        recorded = json.loads((checkpoint / FILE).read_text())
    except (OSError, ValueError):
        return False
    with HFFolder(source) as hf:
        return recorded["source"] == str(source.resolve()) and recorded["files"] == source_files(hf)


def refuse_other_base(where: Path, facts: Facts, recorded: str | None, adapter: Path) -> None:
    """Raises `UserError` when the base in `where` has not the content hash that the adapter records."""
    found = content_hash(facts)
    if recorded is not None and found != recorded:
        raise UserError(
            f"adapter {adapter} was trained on another base than {where}: that one's content hash begins with "
            f"{recorded[:16]}, this one's with {found[:16]}; give the base that was tuned"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder, or a preset name such as pico")
    with HFFolder(resolve_model(parser.parse_args().model), quantized=True) as hf:
        print(content_hash(hf_facts(hf)))
    return 0


if __name__ == "__main__":
    run(main)
