"""The one reader of rows: every format gives the same rows, damage is named by file and number, memory stays small."""

import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nano3.cli import UserError
from nano3.documents import MAX_DEPTH
from nano3.rows import files_of, open_rows, split_of

ROWS = [{"a": "eins, zwei", "b": 'sagt "ja"\nund nein'}, {"a": "três", "b": "\u2028"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = 'a,b\n"eins, zwei","sagt ""ja""\nund nein"\ntrês,\u2028\n'.encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "numbers"),
    [
        ("x.jsonl", LINES, [1, 2]),
        ("x.jsonl", b"\xef\xbb\xbf\n\n" + LINES, [3, 4]),
        ("x.json", LINES, [1, 2]),
        ("x.json", json.dumps(ROWS, indent=2).encode(), [1, 2]),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0), [1, 2]),
        ("no-ending", gzip.compress(LINES[:30], mtime=0) + gzip.compress(LINES[30:], mtime=0), [1, 2]),
        ("x.jsonl.zst", zstd(LINES), [1, 2]),
        ("x.jsonl.zst", zstd(LINES[:30]) + zstd(LINES[30:]), [1, 2]),
        ("x.csv", CSV, [2, 4]),
        ("x.csv.gz", gzip.compress(b"\xef\xbb\xbf" + CSV, mtime=0), [2, 4]),
        ("x.csv", CSV.replace(b",", b";").replace(b"eins;", b"eins,"), [2, 4]),
        ("x.tsv", CSV.replace(b",", b"\t").replace(b"eins\t", b"eins,"), [2, 4]),
        ("x.parquet", parquet(ROWS), [1, 2]),
        ("named-wrongly.jsonl", parquet(ROWS), [1, 2]),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, data: bytes, numbers: list[int]) -> None:
    (tmp_path / name).write_bytes(data)
    rows = open_rows(tmp_path / name)
    found = list(rows)
    assert [row.fields for row in found] == ROWS
    assert [row.where for row in found] == [f"{tmp_path / name}:{number}" for number in numbers]
    assert rows.name == name.split(".")[0]
    (fact,) = rows.facts
    assert fact["name"] == name
    assert len(fact["sha256"]) == 64


@pytest.mark.parametrize("data", [LINES, json.dumps(ROWS).encode(), CSV, gzip.compress(LINES, mtime=0), zstd(CSV)])
def test_standard_input_gives_them_too(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert [row.fields for row in open_rows("-")] == ROWS


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n \n", "x holds no rows"),
        ("x.csv", b"a,b\n", "x holds no rows"),
        ("x.json", b" [ ] ", "x holds no rows"),
        ("x.jsonl", LINES + b"{\n", r"x\.jsonl:3: not valid JSON"),
        ("x.jsonl", b"3\n", r"x\.jsonl:1: a row must be a JSON object, not"),
        ("x.jsonl", b'{"a": 1, "a": 2}\n', r"x\.jsonl:1: not valid JSON \(the key 'a' twice"),
        ("x.jsonl", b'{"a": {"b": ["\\uD83d"]}}\n', r"x\.jsonl:1: .*half a character"),
        ("x.jsonl", b'{"\\ud83d": 1}\n', r"x\.jsonl:1: .*half a character"),
        ("x.jsonl", b'{"a": %s%s}\n' % (b"[" * 50000, b"]" * 50000), r"x\.jsonl:1: nested deeper"),
        ("x.jsonl", b'{"a": %s%s}\n' % (b"[" * (MAX_DEPTH + 1), b"]" * (MAX_DEPTH + 1)), r"x\.jsonl:1: nested deeper"),
        ("x.jsonl", b'{"a": 1%s}\n' % (b"0" * 5000), r"x\.jsonl:1: not valid JSON"),
        ("x.jsonl", b"\xff\xfea\0", "UTF-16 text; save the file as UTF-8"),
        ("x.jsonl", LINES + b'{"a": "\xff"}\n', r"x\.jsonl:3: not UTF-8 text"),
        ("x.json", b'[{"a": 1} {"a": 2}]', "',' expected, found '{\"a\": 2}]'"),
        ("x.json", b'[{"a": 1}, 2]', r"x\.json:2: a row must be a JSON object"),
        ("x.json", b'[{"a": 1}] x', "text follows the end"),
        ("x.json", b'[{"a": 1}, {"a": ', r"x\.json:2: not valid JSON"),
        ("x.json", b'[{"a": 1}', "',' expected, found ''"),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "cannot be unpacked to its end"),
        ("x.jsonl.zst", zstd(LINES)[:20], "cannot be unpacked to its end"),
        ("x.csv", CSV + b"one\n", r"x\.csv:5: 1 cells, but the header names 2"),
        ("x.csv", CSV + b'"open,1\n', r"x\.csv:5: not valid CSV .* quote left open"),
        ("x.csv", b"a,a\n1,2\n", r"x\.csv:1: the header has the name 'a' twice"),
        ("x.csv", b"a,\n1,2\n", r"x\.csv:1: the header has an empty name"),
        ("x.csv", b"\na,b\n1,2\n", r"x\.csv:1: the line is empty; it must name the columns"),
        ("x.parquet", parquet(ROWS)[:-20], "not readable as parquet"),
        ("x.parquet", LINES, "does not begin as a parquet file"),
        ("x.parquet.gz", gzip.compress(parquet(ROWS), mtime=0), "give the plain file"),
        ("x.xlsx", b"PK\x03\x04" + bytes(20), "Excel sheet"),
        ("x.bz2", b"BZh9" + bytes(20), "bzip2"),
        ("x.arrow", b"ARROW1" + bytes(20), "to_parquet"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=reason):
        list(open_rows(tmp_path / name))


def test_whole_characters_outside_the_plane_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "\\ud83d\\ude00"}\n')
    assert [row.fields for row in open_rows(tmp_path / "x.jsonl")] == [{"a": "😀"}]


def test_a_folder_is_its_files_of_one_kind_and_one_split(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for name in ("data/train-00001.jsonl", "data/train-00000.jsonl"):
        (folder / name).write_text(json.dumps({"from": name}) + "\n")
    for name in ("README.md", ".hidden.jsonl", "dataset_infos.json"):
        (folder / name).write_text("not rows")
    rows = open_rows(folder)
    assert [row.fields["from"] for row in rows] == ["data/train-00000.jsonl", "data/train-00001.jsonl"]
    assert rows.name == "set"
    assert [fact["name"] for fact in rows.facts] == ["train-00000.jsonl", "train-00001.jsonl"]
    (folder / "data" / "test-00000.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds the splits test, train; give the files of one"):
        open_rows(folder)
    (folder / "data" / "test-00000.jsonl").rename(folder / "rows.csv")
    with pytest.raises(UserError, match=r"several kinds \(\.csv, \.jsonl\)"):
        open_rows(folder)
    with pytest.raises(UserError, match="holds no file ending in"):
        files_of(tmp_path / "set" / "nothing")


def test_splits_are_words_of_a_name() -> None:
    names = ["gsm8k_test.jsonl", "train-00000-of-00002.parquet", "val.json", "latest.jsonl", "contest.csv"]
    assert [split_of(name) for name in names] == ["test", "train", "validation", None, None]


@pytest.mark.parametrize("kind", ["lines", "array", "csv"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    """20 MB of rows of 2 kB pass through less than 6 MB."""
    rows = ({"a": str(number), "b": "x" * 2000} for number in range(10_000))
    with (tmp_path / "x").open("w") as out:
        if kind == "csv":
            out.write("a,b\n")
            out.writelines(f"{row['a']},{row['b']}\n" for row in rows)
        else:
            start, between, end = ("[", ",", "]") if kind == "array" else ("", "\n", "\n")
            out.write(start)
            for number, row in enumerate(rows):
                out.write((between if number else "") + json.dumps(row))
            out.write(end)
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_rows(tmp_path / "x")) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()


class _Commit:
    sha = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_name_is_streamed_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is not reachable from a test: what `datasets` and the hub's client are asked is recorded."""
    import datasets
    import huggingface_hub

    asked = {}

    def load_dataset(name, config, **options):
        asked.update(name=name, config=config, **options)
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda _self, _name, **_revision: _Commit)
    rows = open_rows("hub:openai/gsm8k@main?config=socratic&split=test")
    assert [row.fields for row in rows] == ROWS
    assert asked == {
        "name": "openai/gsm8k", "config": "socratic", "split": "test", "revision": _Commit.sha, "streaming": True,
    }  # fmt: skip
    assert rows.facts == [{"name": "hub:openai/gsm8k", "config": "socratic", "split": "test", "revision": _Commit.sha}]


@pytest.mark.parametrize("name", ["hub:openai/gsm8k", "hub:a/b/c@main", "hub:x@main?split", "hub:x@main?lang=de"])
def test_a_hub_name_without_revision_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"no data set with a revision|neither config=NAME nor split=NAME"):
        open_rows(name)


def test_what_the_hub_says_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(_self, _name, revision):
        raise RuntimeError(f"401 for {revision}\nlong story")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(UserError, match=r"^hub:a/b@v1: 401 for v1; check name, revision, config, split and network$"):
        list(open_rows("hub:a/b@v1"))
