"""Packs: arithmetic by hand, every document exactly once, bounds, determinism, and refusals."""

import importlib
import json
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import data_prep.best_fit
from data_prep.best_fit import best_fit
from data_prep.packing import PADDING, PackedDataset, build_packs
from data_prep.store import StoreWriter
from data_prep.tokens import ChatTokenizer
from nano3.cli import UserError
from nano3.outputs import fresh_output
from nano3.token_store import FILES, KIND, TokenStore
from tests.helpers.data_fixtures import write_tokenizer


def make_store(folder: Path, lengths: list[int], supervised: int = 1) -> TokenStore:
    """Document d has tokens 100 d, 100 d + 1, ...; its last `supervised` tokens are supervised."""
    encoder = ChatTokenizer(write_tokenizer(folder / "tokenizer"))
    with fresh_output(folder / "store", KIND) as out:
        writer = StoreWriter(out)
        for number, length in enumerate(lengths):
            mask = np.zeros(length, np.uint8)
            mask[length - supervised :] = 1
            writer.add(np.arange(100 * number, 100 * number + length, dtype=np.int32), mask, "test")
        writer.finish(encoder)
    return TokenStore(folder / "store")


def test_one_pack_by_hand(tmp_path: Path) -> None:
    store = make_store(tmp_path, [4, 3])
    facts = build_packs(store, seq_length=8)
    assert (facts["packs"], facts["positions"], facts["efficiency"], facts["supervised_positions"]) == (1, 5, 0.625, 2)
    dataset = PackedDataset(store.folder, 8)
    first, second = dataset.documents(0).tolist()
    sample = dataset[0]
    parts = {0: ([0, 1, 2], [1, 2, 3], [0, 0, 1]), 1: ([100, 101], [101, 102], [0, 1])}
    tail = 8 - 5
    assert sample["tokens"].tolist() == parts[first][0] + parts[second][0] + [0] * tail
    assert sample["labels"].tolist() == parts[first][1] + parts[second][1] + [0] * tail
    assert sample["loss_mask"].tolist() == parts[first][2] + parts[second][2] + [0] * tail
    end = len(parts[first][0])
    assert sample["cu_seqlens"].tolist() == [0, end, 5, 8]
    assert sample["position_ids"].tolist() == [*range(end), *range(5 - end), 0, 1, 2]
    assert sample["source"].tolist() == [0] * 5 + [PADDING] * tail
    kinds = {name: str(array.dtype) for name, array in sample.items()}
    assert kinds == {
        "tokens": "int64",
        "labels": "int64",
        "loss_mask": "float32",
        "position_ids": "int64",
        "source": "int32",
        "cu_seqlens": "int32",
    }


def test_a_sequence_of_padding_counts_nothing(tmp_path: Path) -> None:
    build_packs(make_store(tmp_path, [4, 3]), seq_length=8)
    sample = PackedDataset(tmp_path / "store", 8).padding()
    assert sample["loss_mask"].tolist() == sample["tokens"].tolist() == [0] * 8
    assert sample["cu_seqlens"].tolist() == [0, 8]
    assert sample["source"].tolist() == [PADDING] * 8


def test_padding_belongs_to_its_document(tmp_path: Path) -> None:
    store = make_store(tmp_path, [4, 7])  # 3 and 6 positions, padded to 4 and 8
    build_packs(store, seq_length=12, pad_multiple=4)
    dataset = PackedDataset(store.folder, 12, pad_multiple=4)
    sample = dataset[0]
    first = dataset.documents(0)[0]
    assert sample["cu_seqlens"].tolist() == ([0, 4, 12] if first == 0 else [0, 8, 12])  # full: no tail segment
    start = 0 if first == 0 else 8
    assert sample["tokens"][start : start + 4].tolist() == [0, 1, 2, 0]
    assert sample["loss_mask"][start : start + 4].tolist() == [0, 0, 1, 0]
    assert sample["position_ids"][start : start + 4].tolist() == [0, 1, 2, 3]


def test_every_document_is_in_exactly_one_pack(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 300).tolist()
    store = make_store(tmp_path, lengths)
    build_packs(store, seq_length=64, pad_multiple=2, max_documents=5)
    dataset = PackedDataset(store.folder, 64, pad_multiple=2)
    seen = []
    total = 0
    for number in range(len(dataset)):
        documents = dataset.documents(number).tolist()
        assert 1 <= len(documents) <= 5
        seen += documents
        sample = dataset[number]
        assert sample["cu_seqlens"][0] == 0
        assert sample["cu_seqlens"][-1] == 64
        assert (np.diff(sample["cu_seqlens"]) % 2 == 0).all()
        total += int(sample["loss_mask"].sum())
        for document, start in zip(documents, sample["cu_seqlens"], strict=False):
            stored, _ = store.document(document)
            assert sample["tokens"][start : start + len(stored) - 1].tolist() == stored[:-1].tolist()
            assert sample["labels"][start : start + len(stored) - 1].tolist() == stored[1:].tolist()
    assert sorted(seen) == list(range(300))
    assert total == store.manifest["supervised_tokens"]


@pytest.mark.parametrize("capacity", [600, 511, 512, 5000])
def test_best_fit_takes_the_tightest_room(capacity: int) -> None:
    """Against a plain search over all packs, also where room crosses the words of the bit table."""
    lengths = np.random.default_rng(capacity).integers(1, capacity + 1, 400)
    lengths[::3] = lengths[::3] % 40 + 1
    items, offsets = best_fit(lengths, capacity, 6, seed=3)
    packs: list[list[int]] = []
    filled_at: list[int] = []
    for step, item in enumerate(np.random.default_rng(3).permutation(len(lengths)).tolist()):
        rooms = [capacity - int(lengths[pack].sum()) for pack in packs]
        fitting = [n for n, room in enumerate(rooms) if room >= lengths[item] and len(packs[n]) < 6]
        if fitting:  # the tightest, and of equal ones the one that was filled last
            best = min((rooms[n], -filled_at[n], n) for n in fitting)[2]
            packs[best].append(item)
            filled_at[best] = step
        else:
            packs.append([item])
            filled_at.append(step)
    found = [items[start:end].tolist() for start, end in pairwise(offsets)]
    assert sorted(found) == sorted(packs)


def test_an_image_without_numba_packs_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(8).integers(1, 101, 500)
    compiled = best_fit(lengths, 100, 7, seed=5)
    monkeypatch.setitem(sys.modules, "nano3.cpu.compiled", None)  # the import fails as if Numba were not there
    plain = importlib.reload(data_prep.best_fit)
    assert not hasattr(plain._fit, "py_func")
    assert all((a == b).all() for a, b in zip(compiled, plain.best_fit(lengths, 100, 7, seed=5), strict=True))
    monkeypatch.undo()
    assert hasattr(importlib.reload(data_prep.best_fit)._fit, "py_func")


def test_efficiency_and_bound_on_realistic_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(350) - 0.32, 0.8, 50_000).astype(np.int64), 2, 4096)
    items, offsets = best_fit(lengths, 4096, 16, seed=0)
    filled = np.add.reduceat(lengths[items], offsets[:-1])
    assert filled.max() <= 4096
    assert np.diff(offsets).max() <= 16
    assert filled.mean() / 4096 > 0.99
    assert np.bincount(items).tolist() == [1] * len(lengths)


def test_same_seed_same_packs_other_seed_other_packs(tmp_path: Path) -> None:
    store = make_store(tmp_path, list(range(2, 40)))
    index = store.folder / "packs-64"
    before = {name: (store.folder / name).stat().st_mtime_ns for name in [*FILES, "manifest.json"]}
    contents = []
    for seed in (1, 1, 2):
        build_packs(store, 64, seed=seed)
        contents.append((index / "documents.bin").read_bytes() + (index / "packs.idx").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    # Packing again rewrites the index only, and another length stands beside it.
    build_packs(store, 128)
    assert before == {name: (store.folder / name).stat().st_mtime_ns for name in before}
    assert {path.name for path in store.folder.glob("packs-*")} == {"packs-64", "packs-128"}


def test_long_documents_are_refused_or_dropped_with_a_count_never_cut(tmp_path: Path) -> None:
    store = make_store(tmp_path, [9, 10, 30])  # 8, 9 and 29 positions
    with pytest.raises(UserError, match=r"2 of 3 documents .* the longest takes 29 positions.*--drop-long"):
        build_packs(store, 8)
    assert not (store.folder / "packs-8").exists()
    facts = build_packs(store, 8, drop_long=True)
    assert (facts["documents"], facts["dropped_documents"]) == (1, 2)
    assert PackedDataset(store.folder, 8)[0]["tokens"].tolist() == list(range(8))
    with pytest.raises(UserError, match="no document fits"):
        build_packs(store, 4, drop_long=True)


def test_nothing_supervised_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no supervised token"):
        build_packs(make_store(tmp_path, [5], supervised=0), 8)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seq_length": 0}, "--seq-length 0"),
        (
            {"seq_length": 10, "pad_multiple": 4},
            r"--seq-length 10 is not a multiple of --pad-multiple 4; the next is 12",
        ),
        ({"seq_length": 8, "pad_multiple": 0}, "--pad-multiple 0"),
        ({"seq_length": 8, "max_documents": 0}, "--max-docs-per-pack 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_packs(make_store(tmp_path, [5]), **settings)


def test_missing_stale_and_truncated_indexes_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, [5, 6])
    with pytest.raises(UserError, match=r"has no packs-16-pad2 \(it has none\).*--seq-length 16 --pad-multiple 2"):
        PackedDataset(store.folder, 16, 2)
    build_packs(store, 16)
    index = store.folder / "packs-16"
    (index / "documents.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"documents\.bin is missing or truncated; run: python data_prep/repack\.py"):
        PackedDataset(store.folder, 16)
    build_packs(store, 16)
    manifest = store.folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"note": 1}))
    with pytest.raises(UserError, match="made for other data"):
        PackedDataset(store.folder, 16)
    (index / "packs.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        PackedDataset(store.folder, 16)


def test_dataset_travels_to_workers_without_its_data(tmp_path: Path) -> None:
    store = make_store(tmp_path, [50] * 400)
    build_packs(store, 64)
    dataset = PackedDataset(store.folder, 64)
    expected = dataset[3]
    message = pickle.dumps(dataset)
    assert len(message) < 5000 < (store.folder / "tokens.bin").stat().st_size
    received = pickle.loads(message)[3]
    assert all((received[name] == expected[name]).all() for name in expected)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
