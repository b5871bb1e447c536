"""Writes safetensors files in a work folder: tensors on any thread, each from its first byte to its last, hashed.

`rewrite` makes one Hugging Face folder of another: some tensors changed, all others byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.model_folder import TensorFolder
from conversion.checkpoint.output_folder import PART, UnfinishedOutput, progress
from conversion.checkpoint.pieces import PIECE, in_parallel, read_exactly, scratch, write_all
from conversion.checkpoint.safetensors_layout import INDEX, PLAIN_BYTES, Entry, FileLayout, torch_dtype
from conversion.checkpoint.tensor_digests import Fact, largest_magnitude, raw_bytes, refuse_not_finite

if TYPE_CHECKING:
    import torch

SYNC_BYTES = 256 << 20
"""Bytes after which a file is sent on its way to the disk, while the next are computed."""


class SafetensorsWriter:
    """Writes the files of a layout. Use as a context manager; it is done when every tensor is.

    A file whose tensors are all `done` goes to the disk and is recorded in the work folder. Files that a killed run
    recorded are read again, and taken when they hold what the record says: `todo` is what is left to write.
    """

    def __init__(self, work: UnfinishedOutput, layout: FileLayout) -> None:
        self.work, self.layout = work, layout
        self.facts: dict[str, Fact] = {}
        self.notes: dict[str, Any] = {}
        """What `done` was told of each tensor, in this run or in the killed one."""
        self._lock = threading.Lock()
        self._digests: dict[str, Any] = {}
        self._written = dict.fromkeys(layout.entries, 0)
        self._files: dict[str, int] = {}
        self._unsynced = dict.fromkeys(layout.headers, 0)
        self._left = {file: [n for n, e in layout.entries.items() if e.file == file] for file in layout.headers}

    @property
    def todo(self) -> list[str]:
        """Tensors that are not written yet: file by file, the larger ones of a file first."""
        entries = self.layout.entries
        return sorted(
            (name for name in entries if name not in self.facts),
            key=lambda name: (entries[name].file, entries[name].start - entries[name].stop),
        )

    def __enter__(self) -> SafetensorsWriter:
        self._syncer = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []
        in_parallel([file for file in self.layout.headers if self.work.recorded(file)], self._take_over)
        for file, header in self.layout.headers.items():
            path = self.work.hide(file)
            if not self._left[file]:
                continue
            self._files[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            write_all(self._files[file], memoryview(struct.pack("<Q", len(header)) + header), 0)
            os.ftruncate(self._files[file], self.layout.sizes[file])
        if self.layout.index is not None:
            self.work.hide(INDEX).write_bytes(self.layout.index)
        return self

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Writes `rows` as rows `start` and following of a tensor; they come in order."""
        entry = self.layout.entries[name]
        assert rows.dtype == torch_dtype(entry.dtype), (name, rows.dtype, entry.dtype)
        assert tuple(rows.shape[1:]) == entry.shape[1:], (name, rows.shape, entry.shape)
        assert start * entry.row_bytes == self._written[name], (name, start, self._written[name])
        self.put(name, raw_bytes(rows))

    def put(self, name: str, data: memoryview) -> None:
        """Writes the next bytes of a tensor."""
        entry, begin = self.layout.entries[name], self._written[name]
        assert begin + len(data) <= entry.stop - entry.start, (name, begin, len(data))
        digest = self._digests.setdefault(name, hashlib.sha256())
        for first in range(0, len(data), PIECE):
            piece = data[first : first + PIECE]
            digest.update(piece)
            write_all(self._files[entry.file], piece, entry.start + begin + first)
        self._written[name] = begin + len(data)
        with self._lock:
            self._unsynced[entry.file] += len(data)
            if self._unsynced[entry.file] >= SYNC_BYTES:
                self._unsynced[entry.file] = 0
                self._syncs.append(self._syncer.submit(os.fdatasync, self._files[entry.file]))

    def done(self, name: str, note: Any = None) -> None:
        """Says that a tensor is complete; `note` (JSON) is kept with it. The last of a file closes and records it."""
        entry = self.layout.entries[name]
        assert self._written[name] == entry.stop - entry.start, f"{name} is not written completely"
        fact = Fact(entry.dtype, entry.shape, self._digests.pop(name, hashlib.sha256()).hexdigest())
        with self._lock:
            self.facts[name], self.notes[name] = fact, note
            self._left[entry.file].remove(name)
            if not self._left[entry.file]:
                self._syncs.append(self._syncer.submit(self._close, entry.file))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._syncer.shutdown(cancel_futures=kind is not None)
        for file in self._files.values():
            os.close(file)
        if kind is None:
            for sync in self._syncs:
                sync.result()  # the disk may have been full
            unwritten = [name for names in self._left.values() for name in names]
            assert not unwritten, f"not written: {unwritten[:3]}"

    def _close(self, file: str) -> None:
        os.fsync(self._files[file])
        names = [name for name, entry in self.layout.entries.items() if entry.file == file]
        lines = {name: [self.facts[name].sha256, self.notes[name]] for name in names}
        self.work.record(file, {"tensors": lines})

    def _take_over(self, file: str) -> None:
        """Takes the facts of a recorded file, if it still holds them."""
        recorded = self.work.recorded(file)
        assert recorded is not None
        lines, path = recorded["tensors"], self.work.folder / (file + PART)
        if set(lines) != set(self._left[file]) or not path.is_file() or path.stat().st_size != self.layout.sizes[file]:
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            found = {name: self._digest(descriptor, name) for name in lines}
        finally:
            os.close(descriptor)
        header = path.open("rb").read(8 + len(self.layout.headers[file]))[8:]
        if header == self.layout.headers[file] and all(found[name] == line[0] for name, line in lines.items()):
            for name, (digest, note) in lines.items():
                entry = self.layout.entries[name]
                self.facts[name], self.notes[name] = Fact(entry.dtype, entry.shape, digest), note
            self._left[file] = []

    def _digest(self, file: int, name: str) -> str | None:
        entry, digest = self.layout.entries[name], hashlib.sha256()
        for begin in range(entry.start, entry.stop, PIECE):
            piece = scratch(min(PIECE, entry.stop - begin))
            if not read_exactly(file, piece, begin):
                return None
            digest.update(piece)
        return digest.hexdigest()


@dataclass(frozen=True)
class Passage:
    """A tensor on its way: rows are read from the source and written, in their order, to the output."""

    hf: TensorFolder
    writer: SafetensorsWriter
    name: str

    @property
    def entry(self) -> Entry:
        """Where the tensor lies in the source."""
        return self.hf.layout.entries[self.name]

    def read(self, start: int, count: int) -> torch.Tensor:
        """Rows of the source, valid until this thread's next `read`."""
        return self.hf.rows_into(scratch(count * self.entry.row_bytes), self.name, start, count)

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Writes rows `start` and following. Raises `UserError` when they are not finite."""
        dtype = self.writer.layout.entries[self.name].dtype
        if dtype in PLAIN_BYTES:
            refuse_not_finite(largest_magnitude(raw_bytes(rows), dtype), self.name, self.writer.work.folder)
        self.writer.write(self.name, start, rows)


Change = Callable[[Passage], Any]
"""Reads and writes every row of one tensor; returns what the certificate is to say of it (JSON)."""


def rewrite(
    hf: TensorFolder,
    work: UnfinishedOutput,
    layout: FileLayout,
    changes: Mapping[str, Change],
    added: Mapping[str, torch.Tensor],
    what: str,
) -> SafetensorsWriter:
    """Writes the tensors of `layout`; returns the writer for its `facts` and `notes`, which hold what `changes` said.

    Args:
        changes: how some tensors of `hf` change. All others are copied.
        added: tensors that `hf` does not have, or whole new values.
        what: for the progress bar.
    """

    def do(name: str) -> None:
        note, entry = None, layout.entries[name]
        if name in added:
            writer.write(name, 0, added[name])
        elif name in changes:
            note = changes[name](Passage(hf, writer, name))
        else:
            _copy(hf, writer, name)
        writer.done(name, note)
        bar.update(entry.stop - entry.start)

    with SafetensorsWriter(work, layout) as writer, progress(layout.total_bytes, what) as bar:
        bar.update(sum(entry.stop - entry.start for name, entry in layout.entries.items() if name in writer.facts))
        in_parallel(writer.todo, do)
    return writer


def _copy(hf: TensorFolder, writer: SafetensorsWriter, name: str) -> None:
    entry = hf.layout.entries[name]
    size = entry.stop - entry.start
    for begin in range(0, size, PIECE):
        piece = scratch(min(PIECE, size - begin))
        hf.read_into(piece, name, begin)
        writer.put(name, piece)
