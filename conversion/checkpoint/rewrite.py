"""One Hugging Face folder into another, tensor by tensor on several threads: some changed, all others byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.folders import progress
from conversion.checkpoint.magnitude import largest_magnitude, refuse_not_finite
from conversion.checkpoint.model_folder import ModelFolder
from conversion.checkpoint.output_work import Work
from conversion.checkpoint.parallel import in_parallel, scratch
from conversion.checkpoint.safetensors_layout import PLAIN_BYTES, Entry, FileLayout
from conversion.checkpoint.safetensors_writer import PIECE, SafetensorsWriter
from conversion.checkpoint.tensor_digests import raw_bytes

if TYPE_CHECKING:
    import torch

STEP_BYTES = 16 << 20
"""Bytes of a tensor, in the wider of its two dtypes, that arithmetic takes in one go."""


@dataclass(frozen=True)
class Passage:
    """A tensor on its way: rows are read from the source and written, in their order, to the output."""

    hf: ModelFolder
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
    hf: ModelFolder,
    work: Work,
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


def _copy(hf: ModelFolder, writer: SafetensorsWriter, name: str) -> None:
    entry = hf.layout.entries[name]
    size = entry.stop - entry.start
    for begin in range(0, size, PIECE):
        piece = scratch(min(PIECE, size - begin))
        hf.read_into(piece, name, begin)
        writer.put(name, piece)
