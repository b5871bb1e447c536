"""A large token store of many parts, sparse on the disk: how long it takes to open, and what reading packs costs.

    python benchmarks/bench_store.py FOLDER [--gigabytes 10] [--parts 100] [--packs 20000]
    python benchmarks/bench_store.py FOLDER --train 30

The store has the manifest, offsets and packs of a real one. Its tokens and stages are holes, which take no room. Packs
are read at random, as training reads them. `--train` trains pico on it instead, so many steps of one pack on one CPU
rank: then every token but a document's first counts in the loss, and the hashes are true. Memory is told apart: what
the process owns (RssAnon), and pages of files that the kernel may take back at any time (RssFile).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from results import ROOT, conditions

from data_prep.best_fit import best_fit
from data_prep.packing import PackedDataset
from nano3.arch import resolve_model
from nano3.cli import UserError, run
from nano3.file_digests import file_sha256
from nano3.pack_index import DOCUMENTS, FACTS, OFFSETS, index_name
from nano3.pack_index import KIND as INDEX
from nano3.pack_index import VERSION as INDEX_VERSION
from nano3.sealed_folder import mark, seal
from nano3.token_store import DTYPES, KIND, MANIFEST, PER_TOKEN, VERSION, part_name, tokenizer_sha256
from nano3.training.journal import FILE

SEQ = 4096
LENGTH = 400
"""Tokens of a document."""


def make(store: Path, size: int, parts: int) -> None:
    """A store whose arrays per token have `size` bytes in all, in so many parts, packed."""
    each = size // sum(np.dtype(DTYPES[name]).itemsize for name in PER_TOKEN) // parts // LENGTH
    documents = each * parts
    arrays = {
        "documents.idx": np.arange(documents + 1, dtype=np.int64) * LENGTH,
        "sources.bin": np.zeros(documents, np.int32),
        "origins.bin": np.zeros((documents, 2), np.int32),
    }
    store.mkdir()
    mark(store, KIND)
    files: dict[str, Any] = {}
    digests: dict[str, str] = {}
    counted = bytes([0] + [1] * (LENGTH - 1))  # what precedes a document's first token does not predict it
    for name, values in arrays.items():
        values.astype(DTYPES[name]).tofile(store / name)
        files[name] = {"bytes": values.nbytes, "sha256": file_sha256(store / name)}
    for part in map(part_name, range(parts)):
        (store / part).mkdir()
        for name in PER_TOKEN:
            path, length = store / part / name, each * LENGTH * np.dtype(DTYPES[name]).itemsize
            with path.open("wb") as file:
                file.truncate(length)
                if name == "loss_mask.bin":
                    file.write(counted * each)
            if name not in digests:  # all parts are alike
                digests[name] = file_sha256(path)
            files[f"{part}/{name}"] = {"bytes": length, "sha256": digests[name]}
    supervised = documents * sum(counted)
    counts = {"documents": documents, "tokens": documents * LENGTH, "supervised_tokens": supervised}
    facts = {"format": KIND, "version": VERSION, **counts, "max_token_id": 0, "sources": {"sparse": counts}}
    facts |= {"longest_document": LENGTH, "weights": [1.0], "origins": ["sparse"], "order": None}
    facts |= {"tokenizer": {"sha256": tokenizer_sha256(resolve_model("pico"))}, "files": files}
    facts["parts"] = [{"documents": each, "tokens": each * LENGTH, "weights": [1.0]}] * parts
    (store / MANIFEST).write_text(json.dumps(facts))
    pack(store, documents)


def pack(store: Path, documents: int) -> None:
    """The pack index, as `build_packs` writes it but for counts that need the tokens."""
    items, offsets = best_fit(np.full(documents, LENGTH - 1), SEQ, 64, 1234)
    folder = store / index_name(SEQ, 1, None)
    folder.mkdir()
    mark(folder, INDEX)
    items.astype("<i8").tofile(folder / DOCUMENTS)
    offsets.astype("<i8").tofile(folder / OFFSETS)
    facts = {"format": INDEX, "version": INDEX_VERSION, "store_sha256": file_sha256(store / MANIFEST)}
    facts |= {"seq_length": SEQ, "pad_multiple": 1, "max_documents": 64, "seed": 1234, "packs": len(offsets) - 1}
    facts |= {"blocks": [len(offsets) - 1], "documents": documents, "dropped_documents": 0}
    positions = documents * (LENGTH - 1)
    facts |= {"positions": positions, "supervised_positions": positions, "most_documents_in_a_pack": 10}
    (folder / FACTS).write_text(json.dumps(facts | {"efficiency": 1.0}))
    seal(folder)


def memory(process: int | str = "self") -> dict[str, float]:
    """MB of a process now."""
    said = Path(f"/proc/{process}/status").read_text()
    return {name: round(int(kb) / 1000, 1) for name, kb in re.findall(r"(RssAnon|RssFile):\s+(\d+) kB", said)}


def read(packs: PackedDataset, number: int) -> None:
    """Reads so many packs at random; what one costs, and the memory, after each quarter."""
    drawn = np.random.default_rng(0).integers(len(packs), size=number).tolist()
    for share in range(4):
        begun = time.process_time()
        for number in drawn[share::4]:
            packs[number]
        us = (time.process_time() - begun) / len(drawn[share::4]) * 1e6
        print({"what": f"read {len(drawn[share::4]):,} packs", "us a pack": round(us, 1), **memory()}, flush=True)


def train(store: Path, steps: int) -> int:
    """Trains pico on the store; what its rank's memory is in each tenth step. The exit code of the training."""
    out = store.parent / "lora"
    command = [sys.executable, "recipes/nemotron_lora.py", "--model", "pico", "--local", "--data", str(store)]
    command += ["--out", str(out), f"train.seq_length={SEQ}", "train.global_batch=1", f"train.steps={steps}"]
    command += ["train.warmup=1", "checkpoint.every=0", "checkpoint.minutes=0", "log.every=1", "log.wandb=off"]
    begun, done, rank = time.perf_counter(), 0, None
    with subprocess.Popen([*command, "log.tensorboard=false"], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.2)
            lines = (out / FILE).read_text().count("\n") if (out / FILE).is_file() else 0
            if lines // 10 == done // 10 and (done or not lines):
                continue
            rank, done = rank or _rank(str(out / "run.json")), lines
            with suppress(FileNotFoundError):  # it ended just now
                print({"step": lines, "s": round(time.perf_counter() - begun, 1), **memory(rank)}, flush=True)
    return process.returncode


def _rank(run: str) -> int:
    """The process that trains the run of this file."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().decode(errors="replace").split("\0")
            if run in words and "finetune.worker" in words:
                return int(entry.parent.name)
    raise UserError(f"no process trains {run}")


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("folder", metavar="FOLDER", type=Path, help="for the store, which is removed at the end")
    parse.add_argument("--gigabytes", type=float, default=10.0, help="of tokens, masks and stages (default: 10)")
    parse.add_argument("--parts", type=int, default=100, help="folders that hold them (default: 100)")
    parse.add_argument("--packs", type=int, default=20_000, help="packs that are read, at random (default: 20000)")
    parse.add_argument("--train", type=int, default=0, metavar="STEPS", help="train pico on it instead, so many steps")
    args = parse.parse_args()
    if args.parts < 1 or args.gigabytes <= 0 or args.packs < 1:
        raise UserError("--gigabytes, --parts and --packs must be above 0")
    store = args.folder / "store"
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        make(store, int(args.gigabytes * 1e9), args.parts)
        print(conditions(), f"{args.gigabytes} GB in {args.parts} parts", flush=True)
        if args.train:
            return train(store, args.train)
        clock, cpu = time.perf_counter(), time.process_time()
        packs = PackedDataset(store, SEQ)
        opened = {"s": round(time.perf_counter() - clock, 4), "CPU s": round(time.process_time() - cpu, 4)}
        print({"what": f"open, {len(packs):,} packs", **opened, **memory()}, flush=True)
        read(packs, args.packs)
    finally:
        for made in (store, args.folder / "lora"):
            shutil.rmtree(made, ignore_errors=True)
    return 0


if __name__ == "__main__":
    run(main)
