"""What a token store and its pack index hold is what was written, and fits together. For whoever is about to use them.

Opening a store (nano3/token_store.py) looks at the manifest and at sizes. Here every byte is hashed, and the arrays are
checked against each other and against the manifest's counts, in pieces and in constant memory but for the offsets. What
was checked once is not read again until it changes (nano3/file_digests.py). Ranks of a run only open: who starts them
has checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nano3.errors import UserError
from nano3.file_digests import recall, remember, remembered_sha256, stamp
from nano3.pack_index import DOCUMENTS, FACTS, OFFSETS
from nano3.sealed_folder import MARKER, SEAL, check_seal
from nano3.token_store import DTYPES, MANIFEST, TokenStore, mapped

_PIECE = 1 << 24
"""Values that are looked at together."""
_FITS = "fits together"


def check_store(store: TokenStore) -> None:
    """Raises `UserError` for the first file of a store that is not what was written, or does not fit the others."""
    files = {store.folder / name: facts for name, facts in store.manifest["files"].items()}
    paths = [store.folder / MANIFEST, *files]

    def check() -> None:
        check_seal(store.folder)
        digests = remembered_sha256(paths)
        for path, facts in files.items():
            if digests[path] != facts["sha256"]:
                raise UserError(f"{path} is damaged: its SHA-256 is not the manifest's; {_AGAIN}")
        for name, problem in _problems(store):
            raise UserError(f"{store.folder / name}: {problem}; {_AGAIN}")

    _once(paths, store.folder, check)


def check_index(store: TokenStore, index: Path, facts: dict[str, Any]) -> None:
    """The same for a pack index of a store that is as it should be. `facts` are its packs.json."""
    paths = [
        store.folder / MANIFEST,
        store.folder / "documents.idx",
        *(index / name for name in (FACTS, DOCUMENTS, OFFSETS)),
    ]

    def check() -> None:
        check_seal(index, required=True)
        documents, offsets = (mapped(index / name, "<i8") for name in (DOCUMENTS, OFFSETS))
        for problem in _index_problems(store, documents, offsets, facts):
            raise UserError(
                f"{index}: {problem}; pack the store again: python data_prep/repack.py {store.folder} "
                f"--seq-length {facts['seq_length']} --pad-multiple {facts['pad_multiple']}"
            )

    _once(paths, index, check)


_AGAIN = "copy the store again from where it was written, or prepare it again with data_prep/prepare.py"


def _once(paths: list[Path], folder: Path, check: Callable[[], None]) -> None:
    """Runs a check of a folder unless these files, and its seal, have passed it in the state that they are in."""
    paths = [*paths, *(path for name in (MARKER, SEAL) if (path := folder / name).is_file())]
    begun, stamps = time.time_ns(), [stamp(path) for path in paths]
    if recall(_FITS, paths) is True:
        return
    check()
    if stamps == [stamp(path) for path in paths]:
        remember(_FITS, paths, stamps, begun, True)


def _problems(store: TokenStore) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it), the first that is found of each kind."""
    manifest, offsets = store.manifest, store.offsets
    tokens = manifest["tokens"]
    if offsets[0] != 0 or offsets[-1] != tokens:
        yield "documents.idx", f"goes from {offsets[0]} to {offsets[-1]}, and must from 0 to {tokens}"
    elif (short := np.flatnonzero(np.diff(offsets) < 2)).size:
        yield "documents.idx", f"document {short[0]} has fewer than 2 tokens"
    else:
        yield from _token_problems(store)
        yield from _source_problems(store)
        yield from _origin_problems(store)


def _token_problems(store: TokenStore) -> Iterator[tuple[str, str]]:
    manifest, begins = store.manifest, store.offsets[:-1]
    extremes = [_extremes(part.tokens) for part in store.parts]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if low < 0 or high != manifest["max_token_id"]:
        yield "tokens.bin", f"tokens go from {low} to {high}, and must from 0 to {manifest['max_token_id']}"
    supervised, counted = 0, False
    for part in store.parts:
        name = str((part.folder / "loss_mask.bin").relative_to(store.folder))
        codes, last = np.bincount(np.zeros(0, int), minlength=256), len(part.weights) - 1
        for piece in _pieces(part.loss_mask):
            codes += np.bincount(piece, minlength=256)
        if codes[last + 1 :].any():
            yield name, f"has a number above {last}, and the manifest has {last} weights"
        supervised += int(codes[1:].sum())
        first, end = np.searchsorted(begins, (part.first, part.first + part.length))
        if first == len(begins) or begins[first] != part.first:
            yield "documents.idx", f"no document begins with {part.folder.name}, and none may lie in two parts"
        counted |= bool(part.loss_mask[begins[first:end] - part.first].any())
    if supervised != manifest["supervised_tokens"]:
        yield "loss_mask.bin", f"{supervised:,} tokens count, and the manifest says {manifest['supervised_tokens']:,}"
    if counted:
        yield "loss_mask.bin", "the first token of a document counts, and nothing predicts it"
    longest = int(np.diff(store.offsets).max(initial=0))
    if longest != manifest.get("longest_document"):
        yield MANIFEST, f"longest_document is {manifest.get('longest_document')}, and the longest has {longest} tokens"


def _source_problems(store: TokenStore) -> Iterator[tuple[str, str]]:
    """Every document's source is one of the manifest's, with its numbers of documents and tokens."""
    numbers, told = mapped(store.folder / "sources.bin", DTYPES["sources.bin"]), store.manifest["sources"]
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(told)):
        yield "sources.bin", f"sources go from {numbers.min()} to {numbers.max()}, and the manifest has {len(told)}"
        return
    documents = np.bincount(numbers, minlength=len(told))
    tokens = np.bincount(numbers, weights=store.lengths(), minlength=len(told))  # exact: far below 2^53
    for (name, counts), found, size in zip(told.items(), documents.tolist(), tokens.tolist(), strict=True):
        if (counts["documents"], counts["tokens"]) != (found, size):
            yield MANIFEST, f"source {name} has {found:,} documents of {size:,.0f} tokens, and the manifest says other"


def _origin_problems(store: TokenStore) -> Iterator[tuple[str, str]]:
    """Every document comes from a row of one of the manifest's files."""
    if "origins.bin" in store.manifest["files"]:
        origins = mapped(store.folder / "origins.bin", DTYPES["origins.bin"]).reshape(-1, 2)
        files = len(store.manifest.get("origins") or ())
        if len(origins) and not (origins.min() >= 0 and origins[:, 0].max() < files):
            yield "origins.bin", f"a document comes from another file than the manifest's {files}, or from no row"


def _index_problems(
    store: TokenStore, documents: np.ndarray, offsets: np.ndarray, facts: dict[str, Any]
) -> Iterator[str]:
    if offsets[0] != 0 or offsets[-1] != len(documents) or (np.diff(offsets) < 1).any():
        yield f"{OFFSETS} does not go from 0 to {len(documents)} in packs of at least one document"
    elif documents.min() < 0 or documents.max() >= len(store):
        yield f"{DOCUMENTS} has numbers from {documents.min()} to {documents.max()}, of {len(store)} documents"
    elif np.bincount(documents, minlength=len(store)).max() > 1:
        yield f"{DOCUMENTS} has a document twice"
    else:
        positions = store.lengths()[documents] - 1
        multiple = facts["pad_multiple"]
        filled = np.add.reduceat(-(-positions // multiple) * multiple, offsets[:-1])
        if filled.max() > facts["seq_length"]:
            yield f"a pack has {filled.max()} positions, more than {facts['seq_length']}"
        found = {
            "documents": len(documents),
            "dropped_documents": len(store) - len(documents),
            "positions": int(positions.sum()),
            "most_documents_in_a_pack": int(np.diff(offsets).max()),
        }
        for name, value in found.items():
            if facts.get(name) != value:
                yield f"{FACTS} says {name} {facts.get(name)}, and its packs make {value}"


def _extremes(values: np.ndarray) -> tuple[int, int]:
    found = [(int(piece.min()), int(piece.max())) for piece in _pieces(values)]
    return min(low for low, _ in found), max(high for _, high in found)


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[begin : begin + _PIECE] for begin in range(0, len(values), _PIECE))
