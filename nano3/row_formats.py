"""The formats that rows are stored in: JSON lines, a JSON array, CSV, parquet; and what compresses them.

Each reader is an iterator of (number, fields) that holds one row or one batch in memory. Numbers count from 1: lines in
JSON lines and CSV, rows in all else. Fields may be a function that gives them: who skips rows parses none of these.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nano3.cli import UserError
from nano3.documents import MAX_BYTES, numbered_lines, parse_json_line

LARGEST_ROW = MAX_BYTES
"""Bytes of one row. A longer one is a file without line ends."""
LARGEST_CELL = 16 << 20
"""Characters of one CSV cell."""
PARQUET_BATCH = 256
"""Rows of a parquet file that are in memory together."""

Fields = dict[str, Any] | Callable[[], dict[str, Any]]
Numbered = Iterator[tuple[int, Fields]]


def unpacked(stream: io.BufferedReader) -> io.BufferedReader | gzip.GzipFile:
    """The stream without the gzip or Zstandard around it, known by its first bytes."""
    head = stream.peek(4)[:4]
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream)
    if head == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return io.BufferedReader(_ArrowStream(pyarrow.CompressedInputStream(stream, "zstd")), 1 << 20)
    return stream


class _ArrowStream(io.RawIOBase):
    """pyarrow's input stream as one of the standard library's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _lines(stream: Any, name: str) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers; a byte order mark is taken off."""
    for number, line in numbered_lines(stream, name):
        try:
            yield number, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def json_lines(stream: Any, name: str) -> Numbered:
    """One JSON object a line; blank lines are skipped."""
    for number, line in _lines(stream, name):
        if line.strip():
            yield number, partial(parse_json_line, line, f"{name}:{number}")


_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"\s*")


def json_array(stream: Any, name: str) -> Numbered:
    """The objects of one JSON array, each decoded as soon as the text holds it whole."""
    text = _Window(stream, name)
    text.skip("[")
    number = 0
    if text.next_is("]"):
        text.skip("]")
    else:
        while True:
            number += 1
            yield number, text.take(f"{name}:{number}")
            if text.next_is("]"):
                text.skip("]")
                break
            text.skip(",")
    if text.next_is(""):
        return
    raise UserError(f"{name}: text follows the end of the JSON array; give one array, or one object a line")


class _Window:
    """The part of a text that is in memory, and where one stands in it."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended, self._size = "", 0, False, 1 << 20

    def _more(self) -> bool:
        """Reads on; what was taken already is let go."""
        if self._ended:
            return False
        data = self._stream.read(self._size)
        self._ended = not data
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._name}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
        self._at = 0
        return True

    def next_is(self, mark: str) -> bool:
        """Whether the next character that is no blank is `mark`; with "" whether the text ends."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1] == mark

    def skip(self, mark: str) -> None:
        if not self.next_is(mark):
            found = self._text[self._at : self._at + 20]
            raise UserError(f"{self._name}: not a JSON array: {mark!r} expected, found {found!r}; copy the file again")
        self._at += 1

    def take(self, where: str) -> Callable[[], dict[str, Any]]:
        """The next object, to be parsed. The text in memory doubles until it holds the object whole."""
        self.next_is("")
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError:
                end = len(self._text)  # the reader of one object says what is wrong
            except ValueError as error:
                self._size = max(1 << 20, len(self._text))
                if len(self._text) - self._at > LARGEST_ROW or not self._more():
                    raise UserError(f"{where}: not valid JSON ({error}); every row must be one JSON object") from error
                continue
            text, self._at, self._size = self._text[self._at : end], end, 1 << 20
            return partial(parse_json_line, text, where)


def csv_rows(stream: Any, name: str) -> Numbered:
    """The records of a CSV file by its header; the separator is that of comma, tab and semicolon which the header has.

    Raises `UserError` for a record with more or fewer cells than the header, a quote that is not closed, or a header
    that is empty, or has an empty name or one name twice.
    """
    csv.field_size_limit(LARGEST_CELL)
    lines = _lines(stream, name)
    first = next(lines, None)
    if first is None:
        return
    separator = max(",\t;", key=re.sub(r'"[^"]*"', "", first[1]).count)
    records = csv.reader(_texts(first, lines), delimiter=separator, strict=True)
    line, header = 1, None
    try:
        for cells in records:
            if header is None:
                header = _header(cells, name)
            elif cells:
                if len(cells) != len(header):
                    raise UserError(f"{name}:{line}: {len(cells)} cells, but the header names {len(header)}")
                yield line, dict(zip(header, cells, strict=True))
            line = records.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}:{line}: not valid CSV ({error}); is a quote left open in this record?") from error


def _texts(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[str]:
    yield first[1]
    for _, text in rest:
        yield text


def _header(cells: list[str], name: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not names:
        raise UserError(f"{name}:1: the line is empty; it must name the columns")
    if names[0] == "":
        names[0] = "index"  # as pandas writes it
    twice = sorted({cell for cell in names if names.count(cell) > 1})
    if twice or "" in names:
        what = f"the name {twice[0]!r} twice" if twice else "an empty name"
        raise UserError(f"{name}:1: the header has {what}; name every column once")
    return names


def parquet_rows(path: Path) -> Numbered:
    """The rows of a parquet file, batch after batch."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    with _readable(path, lambda: number), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_BATCH):
            rows = _Batch(path, batch, number)
            for place in range(len(batch)):
                number += 1
                yield number, partial(rows.row, place)


class _Batch:
    """Rows that are in memory together, turned into objects when the first of them is looked at."""

    def __init__(self, path: Path, batch: Any, before: int) -> None:
        self._path, self._batch, self._before = path, batch, before

    def row(self, place: int) -> dict[str, Any]:
        return self._rows[place]

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        with _readable(self._path, lambda: self._before):
            return self._batch.to_pylist()


@contextmanager
def _readable(path: Path, rows: Callable[[], int]) -> Iterator[None]:
    """Says where a parquet file that is damaged could no longer be read."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: not readable as parquet after row {rows()} ({reason}); download it again") from error
