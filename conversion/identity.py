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
from pathlib import Path
from typing import Any

from conversion.folders import progress
from conversion.layout import Entry
from conversion.safetensors_io import HFFolder
from nano3.arch import resolve_model
from nano3.base_identity import FILE
from nano3.cli import UserError, run

PIECE = 16 << 20
"""Bytes read at once by a thread."""
THREADS = 8


def content_sha256(hf: HFFolder) -> str:
    """The content hash of a model folder, with a progress bar on stderr."""
    return combine(hf, tensor_digests(hf))


def combine(hf: HFFolder, digests: Mapping[str, str]) -> str:
    """The content hash from the digests of all tensors of `hf`."""
    entries = hf.layout.entries
    lines = sorted(f"{name} {entries[name].dtype} {entries[name].shape} {digests[name]}" for name in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tensor_digests(hf: HFFolder) -> dict[str, str]:
    """Tensor name -> SHA-256 of its bytes in the file, with a progress bar on stderr."""
    entries = hf.layout.entries
    files = {name: os.open(hf.path / name, os.O_RDONLY) for name in {entry.file for entry in entries.values()}}
    try:
        with progress(hf.layout.total_bytes, "hash") as bar, ThreadPoolExecutor(THREADS) as threads:
            jobs = {
                name: threads.submit(_digest, hf.path, files[entry.file], entry, bar) for name, entry in entries.items()
            }
            return {name: job.result() for name, job in jobs.items()}
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


def record(hf: HFFolder, checkpoint: Path) -> None:
    """Writes `base.json` into a NeMo checkpoint that is made from `hf`."""
    content = {"sha256": content_sha256(hf), "source": str(hf.path.resolve()), "files": source_files(hf)}
    (checkpoint / FILE).write_text(json.dumps(content, indent=1) + "\n")


def holds(checkpoint: Path, source: Path) -> bool:
    """Whether a NeMo checkpoint was made from the Hugging Face folder `source`, whose files have not changed since."""
    try:
        recorded = json.loads((checkpoint / FILE).read_text())
    except (OSError, ValueError):
        return False
    with HFFolder(source) as hf:
        return recorded["source"] == str(source.resolve()) and recorded["files"] == source_files(hf)


def refuse_other_base(hf: HFFolder, digests: Mapping[str, str], recorded: str | None, adapter: Path) -> None:
    """Raises `UserError` when `hf` (its tensors' `digests`) is not the base whose content hash the adapter records."""
    found = combine(hf, digests)
    if recorded is not None and found != recorded:
        raise UserError(
            f"adapter {adapter} was trained on another base than {hf.path}: that one's content hash begins with "
            f"{recorded[:16]}, this one's with {found[:16]}; give the base that was tuned"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder, or a preset name such as pico")
    with HFFolder(resolve_model(parser.parse_args().model), quantized=True) as hf:
        print(content_sha256(hf))
    return 0


if __name__ == "__main__":
    run(main)
