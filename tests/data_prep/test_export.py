"""Packs for other frameworks, read by their own code, and theirs as a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.exchange import documents_of, packed_rows
from data_prep.export import export, import_packs
from data_prep.packing import PackedDataset, build_packs
from data_prep.prepare import prepare
from data_prep.store import StoreWriter
from nano3.cli import UserError
from nano3.outputs import fresh_output
from nano3.store_contents import check_store
from nano3.token_store import KIND, TokenStore
from tests.helpers import packed_readers
from tests.helpers.data_fixtures import row, write_jsonl, write_tokenizer
from tests.helpers.tiny_store import tiny_store

SEQ = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of 2 to 30 tokens, about half of which are trained."""
    folder = tiny_store(tmp_path_factory.mktemp("export") / "store", 40, 30, 300)
    build_packs(TokenStore(folder), SEQ)
    return folder


def test_a_mask_says_which_token_behind_is_trained(tmp_path: Path) -> None:
    with fresh_output(tmp_path / "store", KIND) as folder:
        writer = StoreWriter(folder)
        for tokens, mask in (([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])):
            writer.add(np.array(tokens), np.array(mask), "hand")
        writer.finish(type("T", (), {"sha256": "0" * 64, "vocab_size": 300}))  # type: ignore[arg-type]
    build_packs(TokenStore(tmp_path / "store"), 3)
    (found,) = packed_rows(PackedDataset(tmp_path / "store", 3))
    lists = {name: values.tolist() for name, values in found.items()}
    first = [5, 6, 7] if lists["input_ids"][0] == 5 else [8, 9]
    masks = {5: [1, 1, 0], 8: [1, 0]}
    rest = [8, 9] if first[0] == 5 else [5, 6, 7]
    assert lists == {
        "input_ids": first + rest,
        "seq_start_id": [0, len(first)],
        "loss_mask": masks[first[0]] + masks[rest[0]],
    }


@pytest.mark.parametrize(
    ("kind", "name", "reader", "boundaries"),
    [
        ("nemo-npy", "packs.npy", packed_readers.nemo, "cu_seqlens"),
        ("megatron-bridge-parquet", "packs.idx.parquet", packed_readers.bridge, "cu_seqlens_q"),
    ],
    ids=["nemo", "bridge"],
)
def test_their_reader_gives_training_what_ours_gives(
    kind: str, name: str, reader: Callable[[Path, int], Any], boundaries: str, store: Path, tmp_path: Path
) -> None:
    packs, trained = PackedDataset(store, SEQ), 0
    assert export(store, SEQ, kind, tmp_path / name) == len(packs) > 5
    theirs = reader(tmp_path / name, SEQ)
    assert len(theirs) == len(packs)
    for number in range(len(packs)):
        ours, batch = packs[number], theirs.collate_fn([theirs[number]])
        used = int(np.count_nonzero(ours["source"] >= 0))
        ends = batch[boundaries][0]
        assert ends[ends >= 0].tolist() == ours["cu_seqlens"].tolist()  # NeMo fills up with -1
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert batch[key][0][:used].tolist() == ours[key][:used].tolist(), key
        assert not batch["loss_mask"][0][used:].any()
        trained += int(batch["loss_mask"].sum())
    assert trained == TokenStore(store).manifest["supervised_tokens"]


def test_what_was_exported_comes_back(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows = write_jsonl(tmp_path / "x.jsonl", [row(f"q{number}", "a" * (number % 5 + 1)) for number in range(20)])
    before, _ = prepare([rows], tokenizer, tmp_path / "before", 128)
    export(tmp_path / "before", 128, "megatron-bridge-parquet", tmp_path / "packs.parquet")
    after = import_packs(tmp_path / "packs.parquet", tokenizer, 128, tmp_path / "after")
    check_store(after)
    documents = [
        sorted((tokens.tolist(), mask.tolist()) for tokens, mask in map(store.document, range(len(store))))
        for store in (before, after)
    ]
    assert documents[0] == documents[1]
    assert after.manifest["tokenizer"] == before.manifest["tokenizer"]
    assert after.origin(0) == "packs.parquet:1"
    assert len(PackedDataset(tmp_path / "after", 128)) >= 1


GOOD = {"input_ids": [5, 6, 7, 8], "seq_start_id": [0, 2], "loss_mask": [1, 0, 1, 0]}


def test_a_row_is_documents() -> None:
    batch = documents_of(GOOD, "here")
    assert batch.tokens.tolist() == [5, 6, 7, 8]
    assert batch.mask.tolist() == [0, 1, 0, 1]
    assert batch.lengths.tolist() == [2, 2]
    # What stands at a document's last token means nothing, and one program writes 1 there.
    assert documents_of(GOOD | {"loss_mask": [1, 1, 1, 1]}, "here").mask.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seq_start_id": [1, 2]}, "must begin with 0 .* it begins with 1"),
        ({"seq_start_id": [0, 3]}, "the document at 3 has 1"),
        ({"seq_start_id": [0, 2, 1]}, "the document at 2 has -1"),
        ({"seq_start_id": [0, 9]}, "the document at 9 has -5"),
        ({"seq_start_id": []}, "seq_start_id"),
        ({"loss_mask": [1, 0, 1]}, "loss_mask has 3 values for 4 input_ids"),
        ({"loss_mask": [2, 0, 1, 0]}, "loss_mask"),
        ({"loss_mask": None}, "loss_mask"),
        ({"input_ids": [5, -6, 7, 8]}, "input_ids"),
        ({"input_ids": [5, 6.0, 7, 8]}, "input_ids"),
        ({"input_ids": ["5", 6, 7, 8]}, "input_ids"),
    ],
)
def test_an_odd_row_is_refused(wrong: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        documents_of(GOOD | wrong, "x.parquet:3")


def parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_files_that_cannot_be_taken_leave_nothing(tmp_path: Path) -> None:
    tokenizer, made = write_tokenizer(tmp_path / "tokenizer"), tmp_path / "made"
    good = {name: [values] for name, values in GOOD.items()}
    for wrong, words in (
        ({"input_ids": [[5, 6, 7, 999_999]]}, r"x\.parquet:1: input_ids has 999999, but .* ends at \d+"),
        ({"loss_mask": [[0, 0, 0, 0]]}, "no token of it is trained"),
        ({"seq_start_id": [[0, 1]]}, "the document at 0 has 1"),
    ):
        path = parquet(tmp_path / "x.parquet", **good | wrong)
        with pytest.raises(UserError, match=words):
            import_packs(path, tokenizer, 64, made)
        assert sorted(left.name for left in tmp_path.iterdir()) == ["tokenizer", "x.parquet"]


def test_what_their_formats_cannot_say_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must end in \.npy"):
        export(store, SEQ, "nemo-npy", tmp_path / "packs.parquet")
    build_packs(TokenStore(store), SEQ, pad_multiple=2)
    with pytest.raises(UserError, match="give packs of --pad-multiple 1"):
        next(packed_rows(PackedDataset(store, SEQ, 2)))
    with fresh_output(tmp_path / "store", KIND) as folder:
        writer = StoreWriter(folder)
        writer.add(np.array([5, 6, 7]), np.array([0, 1, 0.5]), "weighted")
        writer.finish(type("T", (), {"sha256": "0" * 64, "vocab_size": 300}))  # type: ignore[arg-type]
    build_packs(TokenStore(tmp_path / "store"), 4)
    with pytest.raises(UserError, match=r"has loss weights \[.*0\.5.*\]; these formats know 0 and 1 only"):
        export(tmp_path / "store", 4, "megatron-bridge-parquet", tmp_path / "packs.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
