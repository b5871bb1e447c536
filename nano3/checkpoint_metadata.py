"""The `.metadata` of a distributed checkpoint, read as data, for our readers and in the libraries' own.

PyTorch's distributed checkpoints say in a pickle, `.metadata`, which tensors they hold and where; Megatron-Core adds
`common.pt` and objects such as `_extra_state`. `read_metadata` knows the dozen classes of that pickle by name, checks
what was stored and puts it into PyTorch's own.

The libraries' own readers unpickle too. `guard` puts these functions in their place; whoever loads a checkpoint with
Megatron-Core or NeMo calls it first (`nano3.model` does).
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import LARGEST, is_file_name, read_bytes, read_json
from nano3.pickles import REMEDY, Record, load_state, need, tensor_size, unpickle

METADATA = ".metadata"
MAX_BYTES = 64 << 20
"""Largest `.metadata`: a chunk takes 100 to 200 bytes, and a model of 120B parameters in 40,000 chunks 8 MiB."""

_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # What Megatron-Core adds when it keeps plans for the next save; nobody reads them here.
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}
"""(module, name) of every class that a `.metadata` may name, besides the dtypes."""


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` of a distributed checkpoint: shapes, chunks, and where they lie; its plans are left out.

    Raises:
        UserError: no such file, a class that the format does not have (by its name), or contents that contradict one
            another: chunks outside of their tensor or over one another, places outside of the folder.
    """
    try:
        top = unpickle(read_bytes(path, REMEDY, MAX_BYTES), CLASSES)
        return _metadata(top)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not the metadata of a checkpoint: {error}; {REMEDY}") from None


class Backend(TypedDict):
    """Megatron-Core's `metadata.json`: which of its formats the folder has. It would open any that is named here."""

    sharded_backend: Literal["torch_dist"]
    sharded_backend_version: Literal[1]
    common_backend: Literal["torch"]
    common_backend_version: Literal[1]


def check_folder(folder: Path) -> Metadata:
    """Reads what describes a `torch_dist` folder, before Megatron-Core does; returns its metadata.

    Raises:
        UserError: no such folder, another format, a quantized model's state, files that are missing or cut short, and
            what `read_metadata` refuses.
    """
    if not (folder / METADATA).is_file() or not (folder / "metadata.json").is_file():
        raise UserError(f"{folder} is not a Megatron torch_dist checkpoint (.metadata, metadata.json): wrong folder?")
    read_json(folder / "metadata.json", Backend, REMEDY)
    if (folder / "modelopt_state").exists():
        raise UserError(
            f"{folder} holds a model that ModelOpt changed (modelopt_state); give the plain BF16 checkpoint"
        )
    metadata = read_metadata(folder / METADATA)
    lengths: dict[str, int] = {}
    for place in metadata.storage_data.values():
        lengths[place.relative_path] = max(lengths.get(place.relative_path, 0), place.offset + place.length)
    for file, length in lengths.items():
        if not (folder / file).is_file() or (folder / file).stat().st_size < length:
            raise UserError(f"{folder / file} is missing or truncated: copy the checkpoint again")
    return metadata


def _fields(value: Any, name: str, wanted: tuple[str, ...]) -> list[Any]:
    """The state of a record of this name, field by field; None for one that is not there."""
    need(isinstance(value, Record) and value.name == name and value.args == (), "{} is no {}", value, name)
    state = value.state if value.state is not None else {}
    need(isinstance(state, dict), "a {} holds {}", name, state)
    return [state.get(field) for field in wanted]


def _metadata(top: Any) -> Metadata:
    """The checked contents of a `.metadata` in PyTorch's classes."""
    names = ("state_dict_metadata", "storage_data", "version", "mcore_data")
    tensors, storage, version, mcore = _fields(top, "Metadata", names)
    for table in (tensors, storage):
        need(isinstance(table, dict), "it has no table of tensors but {}", table)
    entries = {key: _entry(key, value) for key, value in tensors.items()}
    places = dict(_place(index, info) for index, info in storage.items())
    need(len(places) == len(storage), "it names a chunk twice")
    _check_places(entries, places)
    metadata = Metadata(entries, storage_data=places, storage_meta=StorageMeta())
    metadata.version = version if isinstance(version, str) else None
    if mcore is not None:
        need(isinstance(mcore, dict), "it has the notes {}", mcore)
        metadata.mcore_data = {key: _mcore(key, value) for key, value in mcore.items()}  # type: ignore[attr-defined]
    return metadata


def _entry(key: Any, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    need(isinstance(key, str) and key.isprintable(), "{} is no name of a tensor", key)
    if isinstance(value, Record) and value.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    properties, size, chunks = _fields(value, "TensorStorageMetadata", ("properties", "size", "chunks"))
    need(isinstance(properties, Record) and properties.name == "TensorProperties", "{} has no properties", key)
    need(isinstance(properties.state, tuple) and len(properties.state) == 5, "{} has no properties", key)
    dtype, shape = properties.state[0], tensor_size(size)
    need(isinstance(dtype, torch.dtype), "{} has the dtype {}", key, dtype)
    need(isinstance(chunks, list), "{} has no list of chunks", key)
    boxes = [tuple(map(tensor_size, _fields(chunk, "ChunkStorageMetadata", ("offsets", "sizes")))) for chunk in chunks]
    need(_cover(shape, boxes), "chunks of {} do not cover it once each", key)
    parts = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), parts)


def _cover(shape: tuple[int, ...], boxes: list[tuple[Any, ...]]) -> bool:
    """Whether the boxes are all cells of a grid over the tensor, each once: how parallel layouts cut tensors."""
    if not boxes or any(len(offset) != len(shape) or len(size) != len(shape) for offset, size in boxes):
        return False
    cells = 1
    ends: list[dict[int, int]] = []
    for axis, length in enumerate(shape):
        starts = sorted({offset[axis] for offset, _ in boxes})
        cells *= len(starts)
        if starts[0] != 0 or starts[-1] > length:
            return False
        ends.append(dict(zip(starts, [*starts[1:], length], strict=True)))
    exact = all(
        o + s == ends[axis][o] for offset, size in boxes for axis, (o, s) in enumerate(zip(offset, size, strict=True))
    )
    return exact and cells == len(boxes) == len({offset for offset, _ in boxes})


def _place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    key, offset, hint = _fields(index, "MetadataIndex", ("fqn", "offset", "index"))
    need(isinstance(key, str) and (hint is None or type(hint) is int), "{} is no name of a chunk", key)
    names = ("relative_path", "offset", "length", "transform_descriptors")
    file, begin, length, transforms = _fields(info, "_StorageInfo", names)
    need(isinstance(file, str) and is_file_name(file), "{} lies in {}, no file of this folder", key, file)
    whole = all(type(number) is int and 0 <= number <= LARGEST for number in (begin, length))
    need(whole, "{} lies at {} for {} bytes of {}", key, begin, length, file)
    need(not transforms, "{} is stored as {}, which this project does not read", key, transforms)
    return MetadataIndex(key, None if offset is None else tensor_size(offset), hint), _StorageInfo(file, begin, length)


def _check_places(entries: dict[str, Any], places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Every chunk has a place, no two share one, and each can hold its values."""
    sizes = {
        MetadataIndex(key, chunk.offsets): math.prod(chunk.sizes) * entry.properties.dtype.itemsize
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    }
    for index, size in sizes.items():
        need(index in places, "a chunk of {} is nowhere", index.fqn)
        need(
            places[index].length >= size,
            "a chunk of {} has {} bytes in a place of {}",
            index.fqn,
            size,
            places[index].length,
        )
    ordered = sorted(places.values(), key=lambda place: (place.relative_path, place.offset))
    for one, two in itertools.pairwise(ordered):
        apart = one.relative_path != two.relative_path or one.offset + one.length <= two.offset
        need(apart, "two chunks lie over one another in {} at byte {}", one.relative_path, two.offset)


def _mcore(key: Any, value: Any) -> dict[str, Any]:
    """Megatron-Core's note on a tensor that it stored in another shape."""
    need(isinstance(key, str) and isinstance(value, dict), "{} has the note {}", key, value)
    return {str(name): tensor_size(shape) for name, shape in value.items()}


def guard() -> None:
    """Puts these readers in the place of those of PyTorch's distributed checkpoints and of Megatron-Core's.

    Objects named `_extra_state` are Transformer Engine's, which unpickles them: they hold the scales of FP8 training,
    of which there is none here, and are given back empty.
    """
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint._nested_dict import set_element

    def read(self: Any, *_: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self._get_metadata_path(kwargs.get("rank"))))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        # Megatron-Core stores the objects of a key as a list, and each shard of `_extra_state` under a key of its own.
        empty = [torch.empty(0, dtype=torch.uint8)]
        loaded = empty if "_extra_state" in key else load_state(value, f"the object {key}")
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:
            self.state_dict[key] = loaded

    def load_common(_self: Any, folder: Path | str) -> Any:
        path = Path(folder) / COMMON_STATE_FNAME
        return load_state(path, str(path))

    FileSystemReader.read_metadata = read  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]
    TorchCommonLoadStrategy.load_common = load_common  # type: ignore[method-assign]


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Megatron-Core's `dist_checkpointing.load` of a folder that was checked first; all ranks must call it.

    Raises:
        UserError: what `check_folder` refuses, tensors that are not there in this shape, values that cannot be read.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    guard()
    check_folder(folder)
    try:
        return dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, CheckpointException) as error:
        raise unreadable(error, str(folder)) from error


def unreadable(error: BaseException, where: str) -> UserError:
    """The error of a checkpoint that the libraries could not read, with the first rank's reason in a line."""
    failures = getattr(error, "failures", None)
    reason = next(iter(failures.values()))[0] if failures else error
    if isinstance(reason, UserError):
        return reason
    return UserError(f"{where} cannot be loaded ({' '.join(str(reason).split())[:300]}); {REMEDY}")
