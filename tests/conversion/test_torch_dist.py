"""The reader of torch_dist: regions of chunks however they are cut and stored, against slices of the whole."""

from __future__ import annotations

import io
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from conversion.checkpoint.torch_dist import TorchDistReader, data_begin
from conversion.checkpoint.torch_dist_writer import BACKENDS
from nano3.cli import UserError

WHOLE = torch.arange(2 * 6 * 8, dtype=torch.float32).view(2, 6, 8).bfloat16()


def stored(value: torch.Tensor, way: str) -> torch.Tensor:
    """The same values, laid out in memory in another way."""
    if way == "transposed":
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if way == "view of a larger one":
        return torch.cat([value.flatten(), torch.zeros(5, dtype=value.dtype)])[: value.numel()].view(value.shape)
    if way == "behind others":
        return torch.cat([torch.zeros(5, dtype=value.dtype), value.flatten()])[5:].view(value.shape)
    return value.contiguous()


def write(folder: Path, cuts: tuple[int, int, int], way: str) -> Path:
    """A checkpoint of `WHOLE` under the key `t`, cut into this many pieces along each axis."""
    folder.mkdir()
    places, chunks = {}, []
    data = io.BytesIO(b"some bytes of another tensor")
    data.seek(0, io.SEEK_END)
    size = [length // count for length, count in zip(WHOLE.shape, cuts, strict=True)]
    for a in range(cuts[0]):
        for b in range(cuts[1]):
            for c in range(cuts[2]):
                offset = (a * size[0], b * size[1], c * size[2])
                part = WHOLE[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
                begin = data.tell()
                torch.save(stored(part, way), data)
                places[MetadataIndex("t", offset)] = _StorageInfo("f.distcp", begin, data.tell() - begin)
                chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
    entry = TensorStorageMetadata(TensorProperties(dtype=WHOLE.dtype), WHOLE.shape, chunks)
    (folder / "f.distcp").write_bytes(data.getvalue())
    metadata = Metadata({"t": entry}, planner_data=None, storage_data=places, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps(BACKENDS))
    return folder


@pytest.mark.parametrize("cuts", [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 4), (2, 3, 2)])
@pytest.mark.parametrize("way", ["plain", "transposed", "view of a larger one", "behind others"])
def test_every_region_is_that_of_the_whole(cuts: tuple[int, int, int], way: str, tmp_path: Path):
    reader = TorchDistReader(write(tmp_path / "c", cuts, way))
    assert torch.equal(reader.whole("t"), WHOLE)
    draw = random.Random(0)
    for _ in range(40):
        offset = tuple(draw.randrange(length) for length in WHOLE.shape)
        size = tuple(draw.randint(1, length - o) for length, o in zip(WHOLE.shape, offset, strict=True))
        expected = WHOLE[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        assert torch.equal(reader.read("t", offset, size), expected), (offset, size)


def test_only_plain_chunks_are_read_straight_from_the_file(tmp_path: Path):
    for way, plain in (("plain", True), ("transposed", False), ("view of a larger one", False)):
        folder = write(tmp_path / way, (1, 1, 1), way)
        length = (folder / "f.distcp").stat().st_size - 28
        with (folder / "f.distcp").open("rb") as file:
            begin = data_begin(file.fileno(), _StorageInfo("f.distcp", 28, length), WHOLE.dtype, WHOLE.numel())
            assert (begin is not None) == plain
            assert data_begin(file.fileno(), _StorageInfo("f.distcp", 28, length), torch.float16, WHOLE.numel()) is None
            if begin is not None:
                file.seek(begin)
                assert file.read(WHOLE.nbytes) == WHOLE.view(torch.uint8).numpy().tobytes()


def test_a_tensor_that_its_chunks_do_not_cover_is_refused(tmp_path: Path):
    folder = write(tmp_path / "c", (2, 1, 1), "plain")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    del metadata.state_dict_metadata["t"].chunks[1]
    metadata.storage_data = {key: place for key, place in metadata.storage_data.items() if key.offset[0] == 0}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="chunks of t do not cover it"):
        TorchDistReader(folder).whole("t")
