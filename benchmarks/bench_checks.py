"""What it costs to know that nothing changed: the checks at the start of a run, on sparse files of real sizes.

    python benchmarks/bench_checks.py FOLDER [--store-gb 100] [--base-gb 63]

FOLDER gets a token store and a NeMo base that take no room on a disk with sparse files. Both are read once, as a run
does that meets them for the first time on this machine; then the same checks are timed again, in a process of their
own, when all is known and nothing changed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from data_prep.packing import PackedDataset, build_packs
from nano3.cli import run
from nano3.file_digests import RECENT_NS, remembered_sha256
from nano3.sealed_folder import check_seal, mark, seal
from nano3.token_store import DTYPES, FILES, KIND, MANIFEST, VERSION, TokenStore

LENGTH = 4097
"""Tokens of every document: a pack of 4,096 positions holds one."""
SHARDS = 13
"""Files of the base, as the published model has."""


def sparse(path: Path, size: int) -> None:
    """A file of `size` bytes, all zeros, that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def make_store(folder: Path, size: int) -> None:
    """A store of about `size` bytes whose tokens are all 0, one of them supervised, and its packs."""
    documents = size // (6 * LENGTH)  # a token takes 4 bytes, its mask and its stage one each
    tokens = documents * LENGTH
    values = {"tokens.bin": tokens, "loss_mask.bin": tokens, "stages.bin": tokens, "sources.bin": documents}
    for name, count in (values | {"origins.bin": 2 * documents}).items():
        sparse(folder / name, count * np.dtype(DTYPES[name]).itemsize)
    with (folder / "loss_mask.bin").open("r+b") as mask:
        mask.seek(1)
        mask.write(b"\1")
    (np.arange(documents + 1, dtype="<i8") * LENGTH).tofile(folder / "documents.idx")
    time.sleep(1.1 * RECENT_NS / 1e9)
    digests = remembered_sha256([folder / name for name in FILES])
    counts = {"documents": documents, "tokens": tokens, "supervised_tokens": 1}
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest} for path, digest in digests.items()}
    facts = {"format": KIND, "version": VERSION, "longest_document": LENGTH, "max_token_id": 0, "weights": [1.0]}
    facts |= {"tokenizer": {"sha256": "0" * 64, "vocab_size": 1}, "origins": ["zeros"], "order": None}
    (folder / MANIFEST).write_text(json.dumps({**facts, **counts, "sources": {"zeros": counts}, "files": files}))
    mark(folder, KIND)
    seal(folder)
    build_packs(TokenStore(folder), LENGTH - 1)


def make_base(folder: Path, size: int) -> None:
    """A folder like a NeMo base of `size` bytes."""
    for number in range(SHARDS):
        sparse(folder / "weights" / f"__{number}_0.distcp", size // SHARDS)
    time.sleep(1.1 * RECENT_NS / 1e9)
    mark(folder, "nemo-checkpoint")
    seal(folder)


def checks(folder: Path) -> str:
    """Seconds that the checks take, by the clock and of the processors."""
    started, used = time.perf_counter(), time.process_time()
    PackedDataset(folder / "store", LENGTH - 1).check_contents()
    check_seal(folder / "base", required=True)
    return f"{time.perf_counter() - started:.2f} s ({time.process_time() - used:.2f} s of CPU time)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder for the sparse files; they stay")
    parser.add_argument("--store-gb", type=float, default=100, help="size of the store (default: 100)")
    parser.add_argument("--base-gb", type=float, default=63, help="size of the base (default: 63)")
    parser.add_argument("--again", action="store_true", help="only time the checks of what is there")
    args = parser.parse_args()
    if args.again:
        print(checks(args.folder))
        return 0
    make_store(args.folder / "store", int(args.store_gb * 1e9))
    make_base(args.folder / "base", int(args.base_gb * 1e9))
    time.sleep(1.1 * RECENT_NS / 1e9)
    print(f"read once: {checks(args.folder)}", flush=True)
    command = [sys.executable, __file__, str(args.folder), "--again"]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"nothing changed: {again.stdout.strip()}")
    return 0


if __name__ == "__main__":
    run(main)
