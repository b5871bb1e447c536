"""gigatoken in the place of tokenizers: the same store, and the first difference ends the preparation.

The package is optional and not installed for tests: a stand-in encodes, rightly or with a planted fault.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from data_prep import gigatokens
from data_prep.documents import Options
from data_prep.gigatokens import EVERY, Gigatoken
from data_prep.prepare import prepare
from nano3.cli import UserError
from tests.helpers.data_fixtures import ids, row, write_jsonl, write_tokenizer

Fault = Callable[[str, list[int]], list[int]]


class StandIn:
    """Of `gigatoken.Tokenizer`; `fault` may change the ids of a text."""

    fault: Fault = staticmethod(lambda _text, found: found)
    loaded = 0

    def __init__(self, text: str) -> None:
        self._tokenizer = Tokenizer.from_str(text)
        type(self).loaded += 1

    @classmethod
    def from_json(cls, text: str) -> StandIn:
        return cls(text)

    def encode_batch_list(self, texts: list[str]) -> list[list[int]]:
        assert isinstance(texts, list)
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [type(self).fault(text, one.ids) for text, one in zip(texts, found, strict=True)]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    class Fresh(StandIn):
        loaded = 0

    monkeypatch.setitem(sys.modules, "gigatoken", SimpleNamespace(Tokenizer=Fresh))  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.10.0")
    return Fresh


def reference(texts: list[str]) -> list[list[int]]:
    return [ids(text) for text in texts]


def test_the_store_is_the_same_and_says_so(tmp_path: Path, installed: type[StandIn]) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows = write_jsonl(tmp_path / "x.jsonl", [row(f"q{number}", "a" * (number % 5 + 1)) for number in range(20)])
    plain, _ = prepare([rows], tokenizer, tmp_path / "plain", 128)
    fast, _ = prepare([rows], tokenizer, tmp_path / "fast", 128, Options(backend="gigatoken"))
    for name in plain.manifest["files"]:
        assert (plain.folder / name).read_bytes() == (fast.folder / name).read_bytes(), name
    assert fast.manifest["tokenizer"] == plain.manifest["tokenizer"] | {"backend": "gigatoken 0.10.0"}
    assert "backend" not in json.dumps(plain.manifest)
    assert installed.loaded == 1


def test_a_difference_at_load_or_on_the_way_is_named(tmp_path: Path, installed: type[StandIn]) -> None:
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    probes = [ids(text) if "<|" not in text else None for text in gigatokens.PROBES]
    assert None in probes  # control tokens are compared too
    right = Tokenizer.from_file(str(path))

    def plain(texts: list[str]) -> list[list[int]]:
        return [right.encode(text, add_special_tokens=False).ids for text in texts]

    installed.fault = staticmethod(lambda text, found: found[:-1] if text == "Привет мир" else found)
    with pytest.raises(UserError, match=r"gigatoken gives other ids than tokenizers for 'Привет мир'"):
        Gigatoken(path, plain)
    installed.fault = staticmethod(lambda text, found: [5, *found[1:]] if text.startswith("bad") else found)
    encoder = Gigatoken(path, plain)
    encoder.ids(["good", *["bad"] * (EVERY - 1)])  # none of these is compared but the first
    with pytest.raises(UserError, match=r"for 'bad', from token 0 on: \[5, .* leave --backend gigatoken out"):
        encoder.ids(["bad"])


def test_what_it_remembers_is_bounded(
    tmp_path: Path, installed: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    right, memory = StandIn(path.read_text()), [100 << 20]
    monkeypatch.setattr(gigatokens, "_resident", lambda: memory[0])
    encoder = Gigatoken(path, right.encode_batch_list)  # type: ignore[arg-type]
    memory[0] += gigatokens.GROWTH
    encoder.ids(["a"])
    assert installed.loaded == 1
    memory[0] += 1
    assert encoder.ids(["ab"]) == [ids("ab")]
    assert installed.loaded == 2
    encoder.ids(["a"])
    assert installed.loaded == 2  # grown since it was loaded again: nothing


def test_without_the_package_and_for_a_tokenizer_that_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"not installed; pip install gigatoken==0\.10\.0, or leave it out"):
        Gigatoken(path, reference)  # type: ignore[arg-type]

    def refuse(_text: str) -> None:
        raise ValueError("no such pre-tokenizer")

    fake = SimpleNamespace(Tokenizer=SimpleNamespace(from_json=refuse))
    monkeypatch.setitem(sys.modules, "gigatoken", fake)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cannot take .*tokenizer\.json \(no such pre-tokenizer\)"):
        Gigatoken(path, reference)  # type: ignore[arg-type]
