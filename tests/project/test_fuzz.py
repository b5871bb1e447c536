"""Every reader, fed with changed copies of what it should read (tests/helpers/fuzz.py has the command for many)."""

from __future__ import annotations

import pytest

from tests.helpers import fuzz
from tests.helpers.fuzz import GIB, memory, prepare, readers

READERS = readers()
FEW = 250
"""Inputs for each reader here."""


@pytest.mark.parametrize("name", READERS)
def test_only_a_refusal_in_words_comes_out(name):
    prepare()
    before = memory()
    read = fuzz.fuzz(name, READERS[name], FEW)
    assert read > 0  # the good file; `owner_of` refuses nothing, it says None
    assert memory() - before < GIB


def test_what_fails_is_found_and_kept(tmp_path, monkeypatch):
    """The negative control: a reader that trusts its file."""
    import json

    monkeypatch.setattr(fuzz, "KEPT", tmp_path)
    trusting = fuzz.Reader(
        "a.json", b'{"steps": 3}', lambda folder: range(json.loads((folder / "a.json").read_bytes())["steps"])
    )
    prepare()
    with pytest.raises(BaseException):  # noqa: B017, PT011 - whatever its first bad input raises
        fuzz.fuzz("trusting", trusting, FEW)
    assert list((tmp_path / "trusting").iterdir())
