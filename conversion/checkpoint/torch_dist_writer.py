"""Writes megatron-core's `torch_dist` checkpoint file by file, on several threads, hashed on the way.

PyTorch's own writer keeps every tensor of a file alive until the file is done, which for 63 GB is the whole model;
writing the chunks ourselves is shorter than working around it. Every file holds whole Hugging Face tensors
(conversion/checkpoint/tensor_groups.py) and is recorded when it is on the disk. A killed conversion resumes from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from conversion.checkpoint.model_folder import ModelFolder
from conversion.checkpoint.output_folder import WEIGHTS, UnfinishedOutput
from conversion.checkpoint.pieces import PIECE, in_parallel, read_exactly, scratch, write_all
from conversion.checkpoint.plan import Plan, is_native
from conversion.checkpoint.safetensors_layout import Entry, torch_dtype
from conversion.checkpoint.tensor_digests import Fact, largest_magnitude, refuse_not_finite
from conversion.checkpoint.tensor_groups import Chunk, TensorGroup, file_groups, tensor_groups
from conversion.checkpoint.torch_dist import data_begin

FILE_BYTES = 512 << 20
"""About the size of a `.distcp` file: what one thread writes in one go, and what a killed conversion may lose."""

OBJECTS = "__0_0.distcp"
"""The file of the `_extra_state` objects."""

BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""`metadata.json`, by which megatron-core knows such a folder."""

Place = tuple[int, int]
"""Where a chunk lies in its file: first byte, length."""


def write_weights(
    work: UnfinishedOutput, plan: Plan, hf: ModelFolder, advance: Callable[[int], Any]
) -> dict[str, Fact]:
    """Writes the `weights/` of a checkpoint; returns the facts of all tensors, as they were read and written.

    `advance` is told the bytes of every chunk when it is written. Raises `UserError` for NaN or infinity, by name.
    """
    (work.folder / WEIGHTS).mkdir(exist_ok=True)
    # A file is a task: whole Hugging Face tensors, so that one thread hashes each from its first row to its last.
    rows = {name: entry.rows for name, entry in hf.layout.entries.items()}
    tasks = {
        f"{WEIGHTS}/__0_{number}.distcp": group
        for number, group in enumerate(file_groups(tensor_groups(plan.tensors, rows), FILE_BYTES), 1)
    }
    facts: dict[str, Fact] = {}
    places: dict[str, list[Place]] = {}
    with ThreadPoolExecutor(1) as syncer:
        syncs: list[Future[None]] = []

        def do(file: str) -> None:
            # What a killed run has finished is read and compared, not written again.
            found = _taken_over(work, file, tasks[file], hf)
            if found is None:
                digests, places[file] = _write_file(work.folder / file, tasks[file], hf, advance)
                found = {name: digest.hexdigest() for name, digest in digests.items()}
                syncs.append(syncer.submit(_keep, work, file, found, places[file]))
            else:
                places[file] = [(begin, length) for begin, length in work.recorded(file)["places"]]  # type: ignore[index]
                advance(sum(chunk.nbytes for chunk in tasks[file]))
            for name, digest in found.items():
                entry = hf.layout.entries[name]
                facts[name] = Fact(entry.dtype, entry.shape, digest)

        in_parallel(tasks, do)
        for sync in syncs:
            sync.result()  # the disk may have been full
    # Last of all: with .metadata the folder is a checkpoint.
    _write_metadata(work, plan, ((file, tasks[file], places[file]) for file in tasks))
    return facts


def _write_file(
    path: Path, group: TensorGroup, hf: ModelFolder, advance: Callable[[int], Any]
) -> tuple[dict[str, Any], list[Place]]:
    """Writes one file; returns the digest of every Hugging Face tensor in it and the places of its chunks."""
    digests: dict[str, Any] = {}
    places: list[Place] = []
    position = 0
    with path.open("wb", buffering=0) as file:
        for chunk in group:
            _, size = chunk.tensor.box(chunk.first, chunk.count)
            dtype, buffer = torch_dtype(chunk.planned.dtype), scratch(chunk.nbytes)
            values = position + _values_begin(size, dtype) if chunk.nbytes >= PIECE else None
            _fill(file.fileno(), values, chunk, buffer, hf, digests)
            blob: Any = _Blob(file.fileno(), position, values)
            torch.save(torch.frombuffer(buffer, dtype=dtype).view(size), blob)
            places.append((position, blob.position - position))
            position = blob.position
            advance(chunk.nbytes)
    return digests, places


def _fill(
    file: int, values: int | None, chunk: Chunk, buffer: memoryview, hf: ModelFolder, digests: dict[str, Any]
) -> None:
    """Reads the rows of a chunk; checks, hashes and, from byte `values` of the file on, writes every piece at once."""
    end = 0
    for begin, part in chunk.parts():
        entry = hf.layout.entries[part.name]
        end = begin + part.count * entry.row_bytes
        digest = digests.setdefault(part.name, hashlib.sha256())
        step = max(1, PIECE // entry.row_bytes) * entry.row_bytes
        for first in range(begin, end, step):
            piece = buffer[first : min(first + step, end)]
            hf.read_into(piece, part.name, part.start * entry.row_bytes + first - begin)
            refuse_not_finite(largest_magnitude(piece, entry.dtype), part.name, hf.path)
            digest.update(piece)
            if values is not None:
                write_all(file, piece, values + first)
    buffer[end:] = bytes(len(buffer) - end)  # padding of the vocabulary
    if values is not None:
        write_all(file, buffer[end:], values + end)


class _Blob(io.RawIOBase):
    """Takes what `torch.save` writes of one chunk to `position` of a file, but for the values that are there already,
    from byte `values` on, where they are at least `PIECE`."""

    def __init__(self, file: int, position: int, values: int | None) -> None:
        super().__init__()
        self.file, self.position, self.values = file, position, values

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.values is None or len(view) < PIECE:
            write_all(self.file, view, self.position)
        else:
            assert self.position == self.values, "torch.save puts the values elsewhere than it did before"
        self.position += len(view)
        return len(view)


@lru_cache
def _values_begin(size: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where in what `torch.save` makes of a tensor of at least `PIECE` bytes its values begin."""
    sizes: list[int] = []
    sink: Any = io.RawIOBase()
    sink.write = lambda data: sizes.append(memoryview(data).nbytes)
    torch.save(torch.empty(size, dtype=dtype), sink)
    return sum(sizes[: sizes.index(max(sizes))])


def _keep(work: UnfinishedOutput, file: str, digests: dict[str, str], places: list[Place]) -> None:
    """Records a file once it is on the disk."""
    descriptor = os.open(work.folder / file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    work.record(file, {"digests": digests, "places": places})


def _taken_over(work: UnfinishedOutput, file: str, group: TensorGroup, hf: ModelFolder) -> dict[str, str] | None:
    """The digests of a file that a killed run finished, when its chunks still hold them; else None."""
    recorded, path = work.recorded(file), work.folder / file
    if recorded is None or not path.is_file() or len(recorded["places"]) != len(group):
        return None
    digests: dict[str, Any] = {}
    with path.open("rb") as raw:
        for chunk, (begin, length) in zip(group, recorded["places"], strict=True):
            if not _digest_chunk(raw.fileno(), _StorageInfo(file, begin, length), chunk, hf.layout.entries, digests):
                return None
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    return found if found == recorded["digests"] else None


def _digest_chunk(
    file: int, place: _StorageInfo, chunk: Chunk, entries: dict[str, Entry], digests: dict[str, Any]
) -> bool:
    """Adds the rows of a chunk to their tensors' digests; False when it is not what `torch.save` makes of them."""
    dtype = torch_dtype(chunk.planned.dtype)
    begin = data_begin(file, place, dtype, chunk.nbytes // dtype.itemsize)
    buffer = scratch(chunk.nbytes)
    if begin is None or not read_exactly(file, buffer, begin):
        return False
    for first, part in chunk.parts():
        piece = buffer[first : first + part.count * entries[part.name].row_bytes]
        digests.setdefault(part.name, hashlib.sha256()).update(piece)
    _, size = chunk.tensor.box(chunk.first, chunk.count)
    there: Any = _Comparing(file, place.offset)
    torch.save(torch.frombuffer(buffer, dtype=dtype).view(size), there)
    return there.same and there.position == place.offset + place.length


class _Comparing(io.RawIOBase):
    """Takes what is written for what should stand in an open file, and looks whether it does."""

    def __init__(self, file: int, position: int) -> None:
        super().__init__()
        self.file, self.position, self.same = file, position, True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), PIECE):
            piece = view[begin : begin + PIECE]
            self.same &= os.pread(self.file, len(piece), self.position) == piece
            self.position += len(piece)
        return len(view)


def _write_metadata(
    work: UnfinishedOutput, plan: Plan, written: Iterable[tuple[str, TensorGroup, list[Place]]]
) -> None:
    """Writes the `_extra_state` objects and what makes the files a checkpoint; `.metadata` appears last of all."""
    found: dict[MetadataIndex, _StorageInfo] = {}
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for file, group, places in written:
        for chunk, (begin, length) in zip(group, places, strict=True):
            offset, size = chunk.tensor.box(chunk.first, chunk.count)
            found[MetadataIndex(chunk.planned.key, offset)] = _StorageInfo(Path(file).name, begin, length)
            chunks.setdefault(chunk.planned.key, []).append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        planned.key: TensorStorageMetadata(
            TensorProperties(dtype=torch_dtype(planned.dtype)), torch.Size(planned.shape), chunks[planned.key]
        )
        for planned in plan.tensors
    }
    folder = work.folder / WEIGHTS
    blobs = {native: _object(native) for native in (False, True)}
    with (folder / OBJECTS).open("wb") as objects:
        for key in plan.objects:
            blob = blobs[is_native(key)]
            found[MetadataIndex(key)] = _StorageInfo(OBJECTS, objects.tell(), len(blob))
            entries[key] = BytesStorageMetadata()
            objects.write(blob)
    metadata = Metadata(entries, planner_data=None, storage_data=found, storage_meta=StorageMeta())
    metadata.version = CURRENT_DCP_VERSION
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKENDS))
    work.hide(f"{WEIGHTS}/.metadata").write_bytes(pickle.dumps(metadata))


def _object(native: bool) -> bytes:
    """What the modules store without FP8: Transformer Engine an empty byte tensor, megatron-core's own layer None."""
    buffer = io.BytesIO()
    torch.save([None if native else torch.empty(0, dtype=torch.uint8)], buffer)
    return buffer.getvalue()
