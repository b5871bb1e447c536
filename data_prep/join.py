"""Makes one store of the parts of a preparation: offsets, sources and origins over all parts, the manifest, the packs.

The arrays per token stay as they are, each part's in its folder of the store: joining costs what hashing them costs.
Where there is one part, its arrays are the store's own. Everything is made in a folder beside the parts, of links to
their files; the store gets its name at the end. A join that was killed is made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.packing import build_packs
from data_prep.part_folder import Work
from data_prep.store import HashedFile, write_manifest
from data_prep.summary import Finds, Turns
from nano3.cli import UserError
from nano3.file_digests import remembered_sha256
from nano3.outputs import replace_folder
from nano3.sealed_folder import mark, seal
from nano3.store_parts import PREPARE_AGAIN
from nano3.token_store import (
    DTYPES,
    FILES,
    KIND,
    ORDER,
    PER_TOKEN,
    TokenStore,
    mapped,
    part_name,
)

COUNTED = ("documents", "tokens", "supervised_tokens")


def join(work: Work, seq_length: int, **packing: Any) -> tuple[TokenStore, dict[str, Any]]:
    """The store at `work.out` and the facts of its packs, whose settings are those of `build_packs`.

    Raises:
        UserError: parts are missing, being written, damaged or empty; or the packs cannot be made: then the store is
            there without them.
    """
    markers = _markers(work)
    filled = [number for number, marker in enumerate(markers) if marker["documents"]]
    if not filled:
        rows = sum(marker["finds"]["empty_rows"] for marker in markers)
        raise UserError(f"nothing is left to train on: all {rows} rows have empty answers only")
    for number in filled:
        _check_files(work.part(number), markers[number], markers[0]["order"])
    store = work.folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    mark(store, KIND)
    _write_store(work, store, markers, filled)
    refusal = None
    try:
        facts = build_packs(TokenStore(store), seq_length, **packing)
    except UserError as error:
        refusal = error
    seal(store)
    replace_folder(store, work.out)
    work.finish()
    if refusal is not None:
        raise UserError(f"{refusal}; the tokens stay in {work.out}: pack them with data_prep/repack.py") from refusal
    return TokenStore(work.out), facts


def _markers(work: Work) -> list[Any]:
    """part.json of every part, up to the last."""
    work.refuse_running()
    numbers = work.parts()
    missing = sorted(set(range(max(numbers, default=0) + 1)) - set(numbers))
    if missing:
        raise UserError(f"{work.folder} lacks {part_name(missing[0])}: run its --shard again, then join")
    markers = [work.marker(number) for number in numbers]
    if not markers[-1]["last"]:
        raise UserError(
            f"{work.folder} lacks {part_name(len(markers))} and perhaps more: run all --shard i/n, then join"
        )
    return markers


def _check_files(part: Path, marker: Any, order: str | None) -> None:
    """Every array of a part is there, and what was written; `order` is the row key that the parts keep."""
    expected = {*FILES, *([ORDER] if order else [])}
    if set(marker["files"]) != expected or marker["order"] != order:
        raise UserError(f"{part}/part.json is damaged or of another job: its arrays are others; {PREPARE_AGAIN}")
    digests = remembered_sha256(part / name for name in marker["files"])
    for path, digest in digests.items():
        if digest != marker["files"][path.name]["sha256"]:
            raise UserError(f"{path} is damaged: its SHA-256 is not that of part.json; remove {part} and prepare again")


def _write_store(work: Work, store: Path, markers: Sequence[Any], filled: Sequence[int]) -> None:
    """Arrays and manifest of the store."""
    turns, finds, job = Turns(), Finds(), work.facts()
    for marker in markers:
        turns.merge(marker["turns"])
        finds.merge(marker["finds"])
    parts = [(work.part(number), markers[number]) for number in filled]
    content = _merged([marker for _, marker in parts])
    facts: dict[str, Any] = {
        **{key: job[key] for key in ("tokenizer_folder", "thinking", "no_loss")},
        "template": markers[0]["template"],
        "turns": vars(turns),
        "finds": finds.facts(),
        "inputs": markers[-1]["inputs"],
    }
    if len(parts) == 1:
        part, marker = parts[0]
        for name in marker["files"]:
            _link(part / name, store / name)
        files = marker["files"]
    else:
        files = _document_files(store, parts, content)
        for number, (part, marker) in enumerate(parts):
            for name in PER_TOKEN:
                inner = f"{part_name(number)}/{name}"
                _link(part / name, store / inner)
                files[inner] = marker["files"][name]
        facts["parts"] = [{key: marker[key] for key in ("documents", "tokens", "weights")} for _, marker in parts]
    write_manifest(store, content, markers[0]["tokenizer"], files, **facts)


def _merged(markers: Sequence[Any]) -> dict[str, Any]:
    """What a manifest says of all documents; names in the order in which they first come."""
    sources: dict[str, dict[str, int]] = {}
    for marker in markers:
        for name, counts in marker["sources"].items():
            sums = sources.setdefault(name, dict.fromkeys(COUNTED, 0))
            for key in COUNTED:
                sums[key] += counts[key]
    totals = {key: sum(marker[key] for marker in markers) for key in COUNTED}
    most = {key: max(marker[key] for marker in markers) for key in ("longest_document", "max_token_id")}
    names = {
        key: list(dict.fromkeys(one for marker in markers for one in marker[key])) for key in ("weights", "origins")
    }
    return {**totals, **most, "sources": sources, **names, "order": markers[0]["order"]}


def _document_files(store: Path, parts: Sequence[tuple[Path, Any]], content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the arrays per document over all parts; numbers of sources and files become the store's."""
    names = [name for name in (*FILES, *([ORDER] if content["order"] else [])) if name not in PER_TOKEN]
    files = {name: HashedFile(store / name) for name in names}
    files["documents.idx"].write(np.zeros(1, DTYPES["documents.idx"]).data)
    number_of = {key: {name: number for number, name in enumerate(content[key])} for key in ("sources", "origins")}
    before = 0
    for part, marker in parts:
        arrays = {name: mapped(part / name, DTYPES[name]) for name in names}
        arrays["documents.idx"] = before + arrays["documents.idx"][1:]
        before += marker["tokens"]
        here = {key: np.array([number_of[key][name] for name in marker[key]]) for key in number_of}
        origins = arrays["origins.bin"].reshape(-1, 2)
        for key, numbers in (("sources", arrays["sources.bin"]), ("origins", origins[:, 0])):
            if numbers.size and numbers.max() >= len(here[key]):
                raise UserError(f"{part}/part.json is damaged: it names {len(here[key])} {key} only; {PREPARE_AGAIN}")
        arrays["sources.bin"] = here["sources"][arrays["sources.bin"]]
        arrays["origins.bin"] = np.stack([here["origins"][origins[:, 0]], origins[:, 1]], axis=1)
        for name, values in arrays.items():
            files[name].write(np.ascontiguousarray(values.astype(DTYPES[name], copy=False)).data)
    return {name: {"dtype": DTYPES[name], **file.close()} for name, file in files.items()}


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
