"""Structured input: what is read rightly, what is refused, and how the refusal says so."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Annotated, Literal, NotRequired

import pytest
from annotated_types import MaxLen
from typing_extensions import TypedDict

from nano3 import documents
from nano3.cli import UserError
from nano3.documents import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_YAML,
    AboveZero,
    Count,
    FileName,
    Sha256,
    json_lines,
    parse_json,
    parse_json_line,
    read_json,
    read_yaml,
)


class Shelf(TypedDict):
    """A format of these tests."""

    scale: AboveZero
    books: dict[str, Annotated[list[Count], MaxLen(2)]]
    sha256: NotRequired[Sha256]
    file: NotRequired[FileName]
    kind: NotRequired[Literal["tall", "wide"]]


GOOD = {"scale": 0.5, "books": {"a.b": [1, 2]}, "more": {"kept": [None]}}
BAD = {
    '{"scale": NaN, "books": {}}': "scale is nan; it must be a finite number",
    '{"scale": 1e999, "books": {}}': "scale is inf; it must be a finite number",
    '{"scale": 0, "books": {}}': "scale is 0; it must be above 0",
    '{"scale": "1", "books": {}}': "scale is '1'; it must be a valid number",
    '{"scale": true, "books": {}}': "scale is True; it must be a valid number",
    '{"scale": 1}': "books is missing",
    '{"scale": 1, "books": {"a.b": [1, -1]}}': "books.a.b[1] is -1; it must be at least 0",
    '{"scale": 1, "books": {"a": [1.0]}}': "books.a[0] is 1.0; it must be a valid integer",
    '{"scale": 1, "books": {"a": [9007199254740993]}}': "it must be at most 9007199254740992",
    '{"scale": 1, "books": {"a": [1, 2, 3]}}': "books.a is [1, 2, 3]; it must have at most 2 items",
    '{"scale": 1, "books": {}, "sha256": "AB"}': "sha256 is 'AB'; it must be a SHA-256 in 64 hexadecimal digits",
    '{"scale": 1, "books": {}, "file": "../x"}': "file is '../x'; it must be the name of a file in the same folder",
    '{"scale": 1, "books": {}, "file": "a\\n"}': "file is 'a\\n'; it must be the name of a file",
    '{"scale": 1, "books": {}, "kind": ["tall"]}': "kind is ['tall']; it must be 'tall' or 'wide'",
    '{"scale": 1, "scale": 2, "books": {}}': "the key 'scale' twice in one object",
    "[]": "holds a list; it must be an object",
    "null": "holds null; it must be an object",
    "{": "not valid JSON",
    "": "not valid JSON",
    '{"scale": ' + "9" * 5000 + ', "books": {}}': "not valid JSON (Exceeds the limit",
    '{"x": "\\ud800"}': "\\ud800 is half a character",
    "[" * 100_000: "nested deeper than 64",
    "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1): "nested deeper than 64",
}
"""Document -> what its refusal says."""


def test_a_good_document_comes_back_as_it_is():
    assert parse_json(json.dumps(GOOD), Shelf, "shelf.json") == GOOD
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, list, "deep.json")
    assert parse_json('{"x": "\\ud83d\\ude00"}', dict, "x.json") == {"x": "\N{GRINNING FACE}"}


@pytest.mark.parametrize("text", BAD, ids=[text[:40] for text in BAD])
def test_a_bad_document_is_refused_by_file_field_and_value(text):
    with pytest.raises(UserError) as error:
        parse_json(text, Shelf, "shelf.json", "paint it again")
    said = str(error.value)
    assert said.startswith("shelf.json: ")
    assert BAD[text] in said
    assert said.endswith("; paint it again")
    assert said.isprintable()
    assert len(said) < 500


NUMBERS = {
    "-0": 0,
    "-0.0": -0.0,
    "9007199254740993": 9007199254740993,
    "123456789012345678901234567890": 123456789012345678901234567890,
    "0.1": 0.1,
    "2.2250738585072011e-308": 2.2250738585072011e-308,
    "1e-400": 0.0,
    "1E5": 100000.0,
    '"\\u0000\\ud83d\\ude00"': "\0\N{GRINNING FACE}",
}
"""Where decoders of JSON differ."""
ROW = json.dumps({"id": 7, "messages": [{"role": "user", "content": 'é"\\n'}], "x": [1.5, -2e3, None, True, {}]})


@pytest.mark.parametrize("fast", [True, False])
def test_values_are_those_that_the_text_says(fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(documents, "_fast_json", None)
    for text, value in NUMBERS.items():
        found = parse_json(text, object, "x.json")
        assert (type(found), repr(found)) == (type(value), repr(value))


def test_both_decoders_read_the_same_or_both_refuse(monkeypatch):
    drawn, changed = random.Random(0), 0
    for _ in range(3000):
        text = list(ROW)
        for _ in range(drawn.randint(1, 3)):
            place = drawn.randrange(len(text))
            text[place : place + drawn.randint(0, 2)] = drawn.choice('{}[]",:\\u0d19eE+-. \n\0\ud800é') * drawn.randint(
                0, 2
            )
        said = []
        for decoder in (documents._fast_json, None):
            with monkeypatch.context() as patched:
                patched.setattr(documents, "_fast_json", decoder)
                try:
                    said.append(repr(parse_json("".join(text), object, "x.json")))
                except UserError as error:
                    said.append(str(error))
        assert said[0] == said[1], text
        changed += not said[0].startswith("x.json: ")
    assert 300 < changed < 2700, "some are read and some refused"


def test_without_the_fast_decoder_everything_is_read_by_pythons():
    code = "import sys; sys.modules['jiter'] = None; from nano3.documents import *; print(parse_json('[1]', list, ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1]\n"


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(UserError, match=r"x\.json: not UTF-8 text \(invalid start byte at byte 2\)"):
        parse_json(b'{"\xff": 1}', dict, "x.json")


def test_files_that_are_none_or_never_end_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read \(No such file or directory\); make it"):
        read_json(tmp_path / "none.json", dict, "make it")
    with pytest.raises(UserError, match="no plain file"):
        read_json(tmp_path, dict)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="no plain file"):
        read_json(tmp_path / "pipe.json", dict)
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 20_000_000_000)  # sparse
    with pytest.raises(UserError, match="is larger than 16,384 KiB"):
        read_json(tmp_path / "large.json", dict)


def test_rows_of_json_lines_have_their_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}')
    assert list(json_lines(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]
    for text, says in ((b"[1]", "a row must be a JSON object, not a list"), (b"{" * 99, "not valid JSON")):
        with pytest.raises(UserError, match=says):
            parse_json_line(text, "rows.jsonl:7")
    path.write_bytes(b'{"a": 1}\n' + b" " * (MAX_BYTES + 1))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: a line of more than 16 MiB"):
        list(json_lines(path))


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "scale: 1\nscale: 2\n": "the key 'scale' twice",
    "scale: &x [*x]": "nested deeper than 64",
    LAUGHS: "more than 2,000,000 values",
    "[" * 3000: "nested deeper than 64",
    "scale: 0x" + "f" * 20_000: "a number of more than 64 bits",
    "scale: !!timestamp x": "not valid YAML",
    "scale: !!python/object/apply:os.system [false]": "could not determine a constructor",
    "<<: [{scale: 1}, {books: {}}]": "merge keys (<<) are not read",
    "? {scale: 1}\n: 2": "unhashable key",
    "scale: .nan\nbooks: {}": "scale is nan",
    'scale: "a\\0"': "a text with a NUL character",
    "scale: 2001-99-99": "month must be in 1..12",
    "scale: 1\nbooks: !!set {x}": "books is {'x'}",
    "\x00": "unacceptable character",
}
"""YAML -> what its refusal says."""


@pytest.mark.parametrize("text", BAD_YAML, ids=[text[:40] for text in BAD_YAML])
def test_bad_yaml_is_refused(text, tmp_path):
    path = tmp_path / "shelf.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(path, Shelf)
    assert str(error.value).startswith(f"{path}: ")
    assert BAD_YAML[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_good_yaml_is_read(tmp_path):
    path = tmp_path / "shelf.yaml"
    path.write_text("scale: 0.5\nbooks: &b {a: [1]}\nagain: *b\n")
    assert read_yaml(path, Shelf) == {"scale": 0.5, "books": {"a": [1]}, "again": {"a": [1]}}
    path.write_text("# nothing\n")
    assert read_yaml(path, dict) == {}
    path.write_text("a: " + "x" * MAX_YAML)
    with pytest.raises(UserError, match="is larger than 256 KiB"):
        read_yaml(path, dict)
    path.write_bytes(b"a: \xff")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_yaml(path, dict)


def test_pydantic_is_loaded_by_the_first_document_only():
    code = "import sys, nano3.documents; print('pydantic' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "False False\n"
    )
