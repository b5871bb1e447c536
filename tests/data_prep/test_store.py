"""Tokens and masks by hand, the token store's files, and what its reader refuses."""

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from data_prep import tokens
from data_prep.chat import render, text_of
from data_prep.packing import PackedDataset, build_packs
from data_prep.store import StoreWriter
from data_prep.tokens import ChatTokenizer
from nano3.cli import UserError
from nano3.file_digests import file_sha256
from nano3.messages import CONTROL_TOKENS
from nano3.outputs import fresh_output
from nano3.store_contents import check_store
from nano3.token_store import FILES, KIND, TokenStore, tokenizer_sha256
from tests.helpers.data_fixtures import ids, row, write_tokenizer

START, END, THINK, THOUGHT = (CONTROL_TOKENS[mark] for mark in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def store(tmp_path: Path, tokenizer: ChatTokenizer) -> Path:
    with fresh_output(tmp_path / "store", KIND) as folder:
        writer = StoreWriter(folder)
        writer.add(np.array([10, 20, 30, 11], np.int32), np.array([0, 0, 1, 1], np.uint8), "a")
        writer.add(np.array([10, 131071], np.int32), np.array([0, 1], np.uint8), "b")
        writer.finish(tokenizer, note="kept")
    return tmp_path / "store"


def test_tokens_and_mask_by_hand(tokenizer: ChatTokenizer) -> None:
    (encoded,) = tokenizer.encode([render(row("hi", "yo", "so")["messages"], thinking=True)])
    prompt = [START, *ids("system\n"), END, *ids("\n"), START, *ids("user\nhi"), END, *ids("\n")]
    prompt += [START, *ids("assistant\n"), THINK, *ids("\n")]
    written = [*ids("so\n"), THOUGHT, *ids("\nyo"), END]
    assert encoded.tokens.tolist() == [*prompt, *written, *ids("\n")]
    assert encoded.mask.tolist() == [0] * len(prompt) + [1] * len(written) + [0]
    assert (encoded.tokens.dtype, encoded.mask.dtype) == (np.int32, np.float32)


def test_batch_equals_one_by_one(tokenizer: ChatTokenizer) -> None:
    documents = [render(row(str(n) * n, "é" * n, "r" if n % 2 else None)["messages"], True) for n in range(1, 9)]
    for document, encoded in zip(documents, tokenizer.encode(documents), strict=True):
        (alone,) = tokenizer.encode([document])
        assert alone.tokens.tolist() == encoded.tokens.tolist()
        assert alone.mask.tolist() == encoded.mask.tolist()


NORMALIZED = {
    "NFC": (normalizers.NFC(), lambda text: normalize("NFC", text)),
    "NFKD": (normalizers.NFKD(), lambda text: normalize("NFKD", text)),
    "none": (None, str),
    "several": (
        normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
        lambda t: normalize("NFC", t).lower(),
    ),
    "lower case": (normalizers.Lowercase(), str.lower),
}


def _normalizing(folder: Path, normalizer: normalizers.Normalizer | None) -> Path:
    written = Tokenizer.from_file(str(write_tokenizer(folder) / "tokenizer.json"))
    written.normalizer = normalizer  # type: ignore[assignment]
    written.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", NORMALIZED)
def test_a_tokenizers_normal_form_holds_for_every_text(tmp_path: Path, kind: str) -> None:
    normalizer, expected = NORMALIZED[kind]
    folder = _normalizing(tmp_path, normalizer)
    encoder = ChatTokenizer(folder)
    answers = ["Plain", "cafe\u0301", "ﬁ", "K\u212a", "Plain", "a\u0338>"]
    documents = [render(row("q", answer)["messages"], True) for answer in answers]
    for answer, encoded in zip(answers, encoder.encode(documents), strict=True):
        assert encoded.tokens[encoded.mask > 0].tolist() == [*ids(expected(answer)), END]
    assert encoder.sha256 == tokenizer_sha256(folder), "it is the tokenizer of the file afterwards too"


def test_a_normalizer_that_changes_ascii_must_not_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ChatTokenizer(_normalizing(tmp_path, normalizers.Lowercase()))
    document = render(row("q", "Plain")["messages"], True)
    right = encoder.encode([document])[0].tokens.tolist()
    monkeypatch.setattr(tokens, "_NORMAL_FORMS", (normalizers.Lowercase,))
    assert encoder.encode([document])[0].tokens.tolist() != right


def test_vocabulary_size_is_the_largest_id_plus_one(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.vocab_size == 16 + 256


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"<|im_end|>": 9}, r"<\|im_end\|> is 9, not 11"), ({"<think>": None}, "<think> is None, not 12")],
)
def test_control_tokens_must_have_the_models_ids(tmp_path: Path, change: dict, reason: str) -> None:
    special = {mark: number for mark, number in (CONTROL_TOKENS | change).items() if number is not None}
    with pytest.raises(UserError, match=reason):
        ChatTokenizer(write_tokenizer(tmp_path, special))


def test_unreadable_and_missing_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is not a readable tokenizer"):
        ChatTokenizer(tmp_path)


def test_a_tokenizer_that_joins_prompt_and_reasoning_is_refused(tmp_path: Path) -> None:
    """A token "\\nq" would be one piece in the whole text and two in prompt and reasoning: the mask cannot split it."""
    encoder = ChatTokenizer(write_tokenizer(tmp_path, merges=[("Ċ", "q")]))
    encoder.encode([render(row("a", "b", "reason")["messages"], True)])
    with pytest.raises(UserError, match="joins the newline after <think>"):
        encoder.encode([render(row("a", "b", "quick")["messages"], True)])


def test_a_tokenizer_without_hard_control_tokens_is_refused(tmp_path: Path) -> None:
    """A control token that also swallows the white space beside it changes the text that stands there."""
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = True
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="differently in one piece and in parts"):
        ChatTokenizer(tmp_path)


def test_what_stands_between_control_tokens_is_encoded_once(tmp_path: Path) -> None:
    """Two documents that differ in their questions only; the empty text stands between two marks."""
    encoder, given = ChatTokenizer(write_tokenizer(tmp_path)), []
    ids_of = encoder._ids

    def recorded(texts: Sequence[str]) -> list[list[int]]:
        given.extend(texts)
        return ids_of(texts)

    encoder._ids = recorded
    documents = [render(row(question, "4.")["messages"], True) for question in ("2+2?", "1+3?")]
    batch = encoder.encode_batch(documents)
    assert sorted(given) == ["", "\n", "4.", "assistant\n", "system\n", "user\n1+3?", "user\n2+2?"]
    whole = [encoder._tokenizer.encode(text_of(one), add_special_tokens=False).ids for one in documents]
    assert batch.tokens.tolist() == [*whole[0], *whole[1]]
    assert batch.lengths.tolist() == [*map(len, whole)]


def test_store_round_trip(store: Path) -> None:
    opened = TokenStore(store)
    check_store(opened)
    assert len(opened) == 2
    assert opened.lengths().tolist() == [4, 2]
    assert [part.tolist() for part in opened.document(0)] == [[10, 20, 30, 11], [0, 0, 1, 1]]
    assert [part.tolist() for part in opened.document(1)] == [[10, 131071], [0, 1]]
    manifest = opened.manifest
    assert (manifest["tokens"], manifest["supervised_tokens"], manifest["longest_document"]) == (6, 3, 4)
    assert manifest["sources"]["b"] == {"documents": 1, "tokens": 2, "supervised_tokens": 1}
    assert (manifest["max_token_id"], manifest["note"]) == (131071, "kept")
    assert (store / "tokens.bin").read_bytes() == np.array([10, 20, 30, 11, 10, 131071], "<i4").tobytes()


def test_reader_maps_and_never_loads(store: Path) -> None:
    opened = TokenStore(store)
    assert "tokens" not in vars(opened)
    assert isinstance(opened.tokens.base, np.memmap)
    assert not opened.tokens.flags.writeable
    copy = pickle.loads(pickle.dumps(opened))
    assert "tokens" not in vars(copy)
    assert copy.document(1)[0].tolist() == [10, 131071]


def as_version_2(store: Path, tokenizer: ChatTokenizer) -> None:
    """Rewrites a store as this project wrote it before stages and origins."""
    manifest = json.loads((store / "manifest.json").read_text())
    for name in ("stages.bin", "origins.bin"):
        (store / name).unlink()
        del manifest["files"][name]
    del manifest["origins"], manifest["order"]
    manifest["tokenizer"]["sha256"] = file_sha256(tokenizer.path)
    (store / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    (store / "nano3.json").write_text('{"kind": "token-store", "format": 1}')
    (store / "files.json").unlink()  # nor had it a seal


def test_the_source_of_every_document_is_known(store: Path) -> None:
    opened = TokenStore(store)
    assert [opened.source_names[opened.source(number)] for number in range(2)] == ["a", "b"]
    assert not opened.weighted


def test_a_store_of_version_2_still_opens(store: Path, tokenizer: ChatTokenizer) -> None:
    as_version_2(store, tokenizer)
    opened = TokenStore(store)
    check_store(opened)
    opened.check_tokenizer(tokenizer.path.parent)
    assert opened.document(0)[1].tolist() == [0, 0, 1, 1]
    assert opened.stages(0).tolist() == [0, 0, 0, 0]
    assert (opened.source_names[opened.source(1)], opened.origin(1)) == ("b", "document 1")
    assert build_packs(opened, 8)["blocks"] == [1]
    assert len(PackedDataset(store, 8)) == 1


def test_stages_origins_and_order_come_back(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    tokens, mask = np.array([1, 2, 3], np.int32), np.array([0, 1, 1], np.uint8)
    with fresh_output(tmp_path / "store", KIND) as folder:
        writer = StoreWriter(folder, order="level")
        writer.add(tokens, mask, "a", np.array([0, 1, 255], np.uint8), ("x.jsonl", 7), 2.5)
        writer.add(tokens, mask, "a", origin=("y.jsonl", 1), order=-1)
        writer.finish(tokenizer)
    opened = TokenStore(tmp_path / "store")
    assert [opened.stages(number).tolist() for number in (0, 1)] == [[0, 1, 255], [0, 0, 0]]
    assert (tmp_path / "store" / "stages.bin").read_bytes() == bytes([0, 1, 255, 0, 0, 0])
    assert [opened.origin(number) for number in (0, 1)] == ["x.jsonl:7", "y.jsonl:1"]
    assert opened.order("level").tolist() == [2.5, -1]
    assert opened.order("length").tolist() == [3, 3]
    with pytest.raises(UserError, match="does not keep 'grade' of its rows"):
        opened.order("grade")


def test_a_tokenizer_written_again_is_the_same_one(store: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    written = json.loads(tokenizer.path.read_text())
    written["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "again").mkdir()
    path = tmp_path / "again" / "tokenizer.json"
    path.write_text(json.dumps(dict(reversed(written.items())), indent=7, ensure_ascii=True))
    TokenStore(store).check_tokenizer(path.parent)
    written["model"]["vocab"]["Z"], written["model"]["vocab"]["Y"] = (written["model"]["vocab"][c] for c in "YZ")
    path.write_text(json.dumps(written))
    with pytest.raises(UserError, match="another tokenizer"):
        TokenStore(store).check_tokenizer(path.parent)


def test_weights_are_stored_in_a_byte_each(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    masks = [[0, 0.5, 1], [0, 1, 0], [0, 0.5, 0.25]]
    with fresh_output(tmp_path / "weighted", KIND) as folder:
        writer = StoreWriter(folder)
        for mask in masks:
            writer.add(np.array([10, 20, 11], np.int32), np.array(mask, np.float32), "a")
        writer.finish(tokenizer)
    opened = TokenStore(tmp_path / "weighted")
    assert [opened.document(number)[1].tolist() for number in range(3)] == masks
    assert opened.weighted
    assert opened.manifest["weights"] == [0.5, 1.0, 0.25]
    assert (tmp_path / "weighted" / "loss_mask.bin").read_bytes() == bytes([0, 1, 2, 0, 2, 0, 0, 1, 3])
    assert opened.manifest["supervised_tokens"] == 5


def test_more_weights_than_a_byte_can_number_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    for number in range(1, 256):
        writer.add(np.array([1, 2]), np.array([0, number / 256], np.float32), "a")
    writer.add(np.array([1, 2]), np.array([0, 1 / 256], np.float32), "a")
    with pytest.raises(UserError, match="more than 255 different loss weights; round them"):
        writer.add(np.array([1, 2]), np.array([0, 7.0], np.float32), "a")
    writer.close()


@pytest.mark.parametrize("name", FILES)
def test_truncated_or_missing_files_are_refused_by_name(store: Path, name: str) -> None:
    path = store / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name} has .* bytes and should have"):
        TokenStore(store)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        TokenStore(store)


def test_damaged_bytes_are_found_by_verify(store: Path) -> None:
    data = bytearray((store / "tokens.bin").read_bytes())
    data[0] ^= 1
    (store / "tokens.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"tokens\.bin is not what was written"):
        check_store(TokenStore(store))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 4}, "has version 4, this code reads 2 and 3"),
        ({"version": 1}, "has version 1, this code reads 2 and 3"),
        ({"version": 2}, "list"),
        ({"order": "level"}, "does not list the files .*order"),
        ({"format": "x"}, "does not describe"),
        ({"files": {}}, "list"),
    ],
)
def test_other_manifests_are_refused(store: Path, change: dict, reason: str) -> None:
    path = store / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=reason):
        TokenStore(store)


def test_folders_that_are_no_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a token store"):
        TokenStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        TokenStore(tmp_path)


def test_another_tokenizer_is_refused(store: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    opened = TokenStore(store)
    opened.check_tokenizer(tokenizer.path.parent)
    other = write_tokenizer(tmp_path / "other", merges=[("a", "b")])
    with pytest.raises(UserError, match=f"another tokenizer .* --tokenizer {other}"):
        opened.check_tokenizer(other)


def test_reading_a_store_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, data_prep.prepare; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
