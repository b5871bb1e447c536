"""Rows of data, wherever they are stored: the one reader of preparation, conversion of data, and evaluation.

    for row in open_rows("train.jsonl.gz"):
        row.fields["messages"], row.where        # where: "train.jsonl.gz:17"

An input is a file (JSON lines, a JSON array, CSV, TSV, parquet; plain, gzip or Zstandard), a folder of such files of
one kind, `-` for standard input, or `hub:NAME@REVISION`. Compression is known by the file's first bytes, not by its
name. Everything streams: in memory is one row, one batch of parquet rows, or one page of the hub.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nano3.cli import UserError
from nano3.file_digests import file_sha256
from nano3.outputs import fresh_file
from nano3.row_formats import Fields, Numbered, csv_rows, json_array, json_lines, parquet_rows, unpacked

ENDINGS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Ending of a file's name, without `.gz` or `.zst` -> how it is read."""

_PACKED = (".gz", ".zst")
_OTHER_FILES = {
    b"BZh": "compressed with bzip2; unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ": "compressed with xz; unpack it, or compress it with gzip or zstd",
    b"PK\x03\x04": "a zip archive or an Excel sheet; unpack it, or save the sheet as CSV",
    b"ARROW1": "an Arrow file of datasets.save_to_disk; write it with dataset.to_parquet('rows.parquet')",
    b"\xff\xff\xff\xff": "an Arrow stream of datasets.save_to_disk; write it with dataset.to_parquet('rows.parquet')",
    b"\xff\xfe": "UTF-16 text; save the file as UTF-8",
    b"\xfe\xff": "UTF-16 text; save the file as UTF-8",
    b"SQLite format": "an SQLite database; export the table as CSV",
}
"""First bytes -> what such a file is, and what to do."""
_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "nano3.json"}
"""Files that lie beside data and are none."""
_SPLITS = {
    "train": "train",
    **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "eval", "held"), "test"),
}
_HUB = re.compile(r"hub:([\w.-]+(?:/[\w.-]+)?)@([\w./-]+)(?:\?([\w.=&+-]*))?")


ABOUT = ".about.json"
"""What data_prep/convert.py writes beside `NAME` is called NAME and this."""


class Row:
    """One row: its fields by name, and `where` it stands, `file:number`, for messages to the user. The number is the
    line in JSON lines and CSV, the row in all else. Fields that are given as a function are parsed when they are first
    looked at: a row that is skipped costs little."""

    __slots__ = ("_fields", "where")

    def __init__(self, fields: Fields, where: str) -> None:
        self._fields, self.where = fields, where

    @property
    def fields(self) -> dict[str, Any]:
        """The fields by name. Raises `UserError` for a row that is damaged."""
        if not isinstance(self._fields, dict):
            self._fields = self._fields()
        return self._fields


class Rows:
    """An input that can be read once; iterating gives `Row`s.

    `name` is the source of rows that name none. `facts`, whole once all rows were read, says what was read: of a file
    its name and SHA-256, of a hub data set the commit.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._facts: list[dict[str, Any]] = []

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What was read."""
        return self._facts

    def __iter__(self) -> Iterator[Row]:
        for row in self.unparsed():
            row.fields  # noqa: B018 (a damaged row is refused before it is handed out)
            yield row

    def unparsed(self) -> Iterator[Row]:
        """The same rows, each parsed when its fields are first looked at."""
        empty = True
        for row in self._rows():
            empty = False
            yield row
        if empty:
            raise UserError(f"{self.name} holds no rows; give one conversation or question in a row")

    def _rows(self) -> Iterator[Row]:
        raise NotImplementedError


def open_rows(source: Path | str) -> Rows:
    """The rows of a file, a folder, `-` (standard input) or `hub:NAME@REVISION`.

    Raises `UserError` at once for an input that is not there or of no kind that can be read, and while iterating, with
    file and number, for a row that is damaged.
    """
    text = str(source)
    if text == "-":
        return _StandardInput()
    if text.startswith("hub:"):
        return _HubRows(text)
    path = Path(source)
    if path.is_dir():
        return _FileRows(path, files_of(path))
    if not path.is_file():
        raise UserError(f"no such file: {path}; give a file or folder of rows, - or hub:NAME@REVISION")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with one conversation or question in a row")
    return _FileRows(path, [path])


def write_rows(path: Path | str, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSONL, whole or not at all, and returns how many. An existing file is replaced."""
    with fresh_file(path) as temporary:
        return put_rows(temporary, rows)


def put_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSONL to a temporary file, and returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def put_about(path: Path, about: Mapping[str, Any]) -> None:
    """Writes what stands in `about_file` of a data file to a temporary file."""
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def files_of(folder: Path) -> list[Path]:
    """The data files in a folder and the folders in it, by name; hidden files and other endings are not read.

    Raises `UserError` when there are none, when they are of several kinds, and when their names say that training and
    held-out rows lie beside each other.
    """
    inside = (path for path in sorted(folder.rglob("*")) if path.is_file())
    visible = (path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    files = [path for path in visible if _ending(path) in ENDINGS and _is_data(path.name)]
    if not files:
        raise UserError(f"{folder} holds no file ending in {', '.join(ENDINGS)}; give the file itself")
    kinds = sorted({_ending(path) for path in files})
    if len(kinds) > 1:
        raise UserError(f"{folder} holds files of several kinds ({', '.join(kinds)}); give one of them")
    splits = sorted({split for path in files if (split := split_of(path.name))})
    if len(splits) > 1:
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; give the files of one of them")
    return files


def _is_data(name: str) -> bool:
    return name not in _ABOUT_DATA and not name.endswith(ABOUT)


def about_file(path: Path) -> Path:
    """Where a converted file's origin is written down."""
    return path.with_name(path.name + ABOUT)


def split_of(name: str) -> str | None:
    """The split that a file's name speaks of (`train-00000-of-00002.parquet`, `gsm8k_test.jsonl`), or None."""
    return next((_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS), None)


class _FileRows(Rows):
    """The files of one path, one after the other."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        super().__init__(_stem(path))
        self._files = [(file, _kind(file)) for file in files]
        self._read: list[Path] = []

    def _rows(self) -> Iterator[Row]:
        for path, kind in self._files:
            with path.open("rb") as file:
                numbered = parquet_rows(path) if kind == "parquet" else _text_rows(file, str(path), kind)
                for number, fields in numbered:
                    yield Row(fields, f"{path}:{number}")
            self._read.append(path)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """Name and SHA-256 of the files that were read to their end; each is hashed once, when this is first asked."""
        for path in self._read[len(self._facts) :]:
            self._facts.append({"name": path.name, "sha256": file_sha256(path)})
        return self._facts


class _StandardInput(Rows):
    """Standard input: JSON when it begins with a bracket, else CSV."""

    def __init__(self) -> None:
        super().__init__("stdin")

    def _rows(self) -> Iterator[Row]:
        hashed = _Hashed(sys.stdin.buffer)
        for number, fields in _text_rows(io.BufferedReader(hashed, 1 << 20), self.name, ""):
            yield Row(fields, f"{self.name}:{number}")
        self._facts.append({"name": self.name, "sha256": hashed.hash.hexdigest()})


class _Hashed(io.RawIOBase):
    """A stream that hashes what is read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.hash = stream, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.hash.update(data)
        return len(data)


class _HubRows(Rows):
    """`hub:NAME@REVISION?config=C&split=S`, streamed by `datasets`; a branch is resolved to its commit first."""

    def __init__(self, text: str) -> None:
        match = _HUB.fullmatch(text)
        if not match:
            raise UserError(
                f"{text!r} names no data set with a revision; write hub:NAME@REVISION, such as "
                "hub:openai/gsm8k@main?config=main&split=train"
            )
        name, self._revision, options = match.groups()
        super().__init__(name)
        self._options = {"config": None, "split": "train"}
        for pair in filter(None, (options or "").split("&")):
            key, _, value = pair.partition("=")
            if key not in self._options or not value:
                raise UserError(f"{text!r}: {pair!r} is neither config=NAME nor split=NAME")
            self._options[key] = value

    def _rows(self) -> Iterator[Row]:
        import datasets
        from huggingface_hub import HfApi

        config, split = self._options["config"], self._options["split"]
        try:
            commit = HfApi().dataset_info(self.name, revision=self._revision).sha
            rows = iter(datasets.load_dataset(self.name, config, split=split, revision=commit, streaming=True))
        except Exception as error:  # five libraries below raise kinds of their own
            raise self._refusal(error) from error
        self._facts.append({"name": f"hub:{self.name}", "config": config, "split": split, "revision": commit})
        number = 0
        while True:
            try:
                fields = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._refusal(error) from error
            number += 1
            yield Row(dict(fields), f"{self.name}@{str(commit)[:8]}:{number}")

    def _refusal(self, error: Exception) -> UserError:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return UserError(f"hub:{self.name}@{self._revision}: {reason}; check name, revision, config, split and network")


def _stem(path: Path) -> str:
    """A file's name without its endings, a folder's name."""
    name = path.resolve().name
    for ending in (*_PACKED, *ENDINGS):
        name = name.removesuffix(ending)
    return name


def _ending(path: Path) -> str:
    """The ending that says how to read a file, with `.gz` and `.zst` taken off."""
    return (Path(path.stem) if path.suffix.lower() in _PACKED else path).suffix.lower()


def _kind(path: Path) -> str:
    """How a file is read: by its first bytes where they tell, else by its name; "" leaves it to the text."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PAR1"):
        return "parquet"
    _check_head(head, str(path))
    kind = ENDINGS.get(_ending(path), "")
    if kind == "parquet":
        raise UserError(f"{path} does not begin as a parquet file does; give the plain file, or download it again")
    return kind


def _check_head(head: bytes, name: str) -> None:
    """Refuses files of other kinds by what they are."""
    for magic, advice in _OTHER_FILES.items():
        if head.startswith(magic):
            raise UserError(f"{name} is {advice}")


def _text_rows(file: io.BufferedReader, name: str, kind: str) -> Numbered:
    """Rows of JSON or CSV, unpacked first where they are compressed."""
    try:
        stream = unpacked(file)
        head = stream.peek(1 << 10)
        _check_head(head, name)
        if head.startswith(b"PAR1"):
            raise UserError(f"{name} is a parquet file in a pipe or compressed once more; give the plain file")
        first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if (kind or ("json" if first in (b"{", b"[") else "csv")) == "csv":
            yield from csv_rows(stream, name)
        else:
            yield from (json_array if first == b"[" else json_lines)(stream, name)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{name} cannot be unpacked to its end ({error}); copy or download it again") from error
