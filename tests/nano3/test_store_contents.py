"""A store or pack index whose hashes are right and whose parts do not fit together: whoever wrote it was mistaken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.packing import PackedDataset, build_packs
from nano3 import file_digests
from nano3.cli import UserError
from nano3.sealed_folder import seal
from nano3.store_contents import check_store
from nano3.token_store import DTYPES, TokenStore
from tests.helpers.damage import change_keeping_size_and_time
from tests.helpers.tiny_store import tiny_store

Change = Callable[[np.ndarray, dict[str, Any]], Any]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Forty documents of one source, weights 0 and 1, packed to 64 positions."""
    build_packs(TokenStore(tiny_store(tmp_path / "store", documents=40, longest=30, vocab_size=128)), 64)
    return tmp_path / "store"


def rewrite(store: Path, name: str, change: Change) -> None:
    """Changes an array or the manifest and makes every hash fit, as a tool with a mistake would."""
    manifest = json.loads((store / "manifest.json").read_text())
    array = np.fromfile(store / name, DTYPES[name])
    change(array, manifest)
    array.tofile(store / name)
    manifest["files"][name]["sha256"] = hashlib.sha256((store / name).read_bytes()).hexdigest()
    (store / "manifest.json").write_text(json.dumps(manifest))
    seal(store)


def put(place: Any, value: int) -> Change:
    def change(array: np.ndarray, _: dict[str, Any]) -> None:
        array[place] = value

    return change


FAULTS: dict[str, tuple[str, Change, str]] = {
    "offsets that run past the end": ("documents.idx", lambda a, _: a.__iadd__(1), "goes from 1 to"),
    "an end before its beginning": ("documents.idx", put(20, 0), "document 19 has fewer than 2 tokens"),
    "a token below 0": ("tokens.bin", put(7, -5), "tokens go from -5 to"),
    "a token above the largest": ("tokens.bin", put(7, 131_071), r"to 131071, and must from 0 to 127"),
    "a weight that is none": ("loss_mask.bin", put(1, 7), "has a number above 1, and the manifest has 1 weights"),
    "a first token that counts": ("loss_mask.bin", put(0, 1), "tokens count, and the manifest says"),
    "a source that is none": ("sources.bin", put(3, 77), "sources go from 0 to 77, and the manifest has 1"),
    "a source below 0": ("sources.bin", put(3, -1), "sources go from -1 to 0"),
    "a file that is none": ("origins.bin", put(0, 9), "comes from another file than the manifest's 1"),
    "fewer supervised tokens": ("tokens.bin", lambda _, m: m.update(supervised_tokens=3), "and the manifest says 3"),
    "another longest document": ("tokens.bin", lambda _, m: m.update(longest_document=99), "longest_document is 99"),
    "other counts of a source": (
        "tokens.bin",
        lambda _, m: m["sources"]["random"].update(documents=41),
        "source random has 40 documents",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_do_not_fit_are_refused(store: Path, fault: str):
    name, change, message = FAULTS[fault]
    check_store(TokenStore(store))
    rewrite(store, name, change)
    with pytest.raises(UserError, match=message):
        check_store(TokenStore(store))


def test_offsets_in_another_order_are_refused(store: Path):
    """Same numbers, same ends: documents that overlap and run backwards."""
    rewrite(store, "documents.idx", lambda array, _: array.__setitem__(slice(1, -1), array[1:-1][::-1].copy()))
    with pytest.raises(UserError, match="has fewer than 2 tokens"):
        check_store(TokenStore(store))


def test_a_first_token_that_counts_is_refused_whatever_the_sum(store: Path):
    def move(mask: np.ndarray, _: dict[str, Any]) -> None:
        mask[np.flatnonzero(mask)[0]] = 0
        mask[0] = 1

    rewrite(store, "loss_mask.bin", move)
    with pytest.raises(UserError, match="the first token of a document counts, and nothing predicts it"):
        check_store(TokenStore(store))


PACKS: dict[str, tuple[str, Callable[[np.ndarray], Any], str]] = {
    "a document twice": ("documents.bin", lambda a: a.__setitem__(1, a[0]), "has a document twice"),
    "a document that is none": (
        "documents.bin",
        lambda a: a.__setitem__(0, 40),
        "numbers from 0 to 40, of 40 documents",
    ),
    "an empty pack": ("packs.idx", lambda a: a.__setitem__(1, a[0]), "in packs of at least one document"),
    "packs past the end": ("packs.idx", lambda a: a.__setitem__(-1, 41), "does not go from 0 to 40"),
    "a pack that is too full": (
        "packs.idx",
        lambda a: a.__setitem__(1, a[3] - 1),
        "positions, more than 64|packs of at",
    ),
}


@pytest.mark.parametrize("fault", PACKS)
def test_packs_that_do_not_fit_are_refused(store: Path, fault: str):
    name, change, message = PACKS[fault]
    index = store / "packs-64"
    PackedDataset(store, 64).check_contents()
    array = np.fromfile(index / name, "<i8")
    change(array)
    array.tofile(index / name)
    with pytest.raises(UserError, match="is not what was written"):
        PackedDataset(store, 64).check_contents()
    seal(index)
    with pytest.raises(UserError, match=message):
        PackedDataset(store, 64).check_contents()


def test_what_was_checked_is_not_read_again_until_it_changes(store: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NANO3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "RECENT_NS", -(10**9))
    PackedDataset(store, 64).check_contents()
    with monkeypatch.context() as patch:
        patch.setattr("nano3.store_contents.remembered_sha256", pytest.fail)
        PackedDataset(store, 64).check_contents()
    for name, message in (("tokens.bin", r"tokens\.bin is not"), ("packs-64/packs.idx", r"packs\.idx is not")):
        change_keeping_size_and_time(store / name)
        with pytest.raises(UserError, match=message):
            PackedDataset(store, 64).check_contents()
        change_keeping_size_and_time(store / name)
