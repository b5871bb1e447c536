"""Headers and indexes of safetensors files, read as data. Imports neither torch nor safetensors.

A file is a little-endian 64-bit length, a JSON header of that many bytes, and the values of all tensors without gaps:
https://github.com/huggingface/safetensors. What breaks one of these rules is refused before anything is read by it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len
from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import MAX_BYTES, Count, FileName, Name, Shape, check, parse_json

INDEX = "model.safetensors.index.json"
AGAIN = "download the model again"


class HeaderItem(TypedDict):
    """What a header says of a tensor; its bytes begin and end at `data_offsets` behind the header."""

    dtype: Name
    shape: Shape
    data_offsets: Annotated[list[Count], Len(2, 2)]


class IndexFile(TypedDict):
    """model.safetensors.index.json: tensor -> file."""

    weight_map: dict[Name, FileName]


def read_header(path: Path) -> bytes:
    """The header bytes of a file. Raises `UserError` when they are cut off or too many."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= path.stat().st_size - 8:
            raise UserError(f"{path} is truncated or no safetensors file: {AGAIN}")
        if length > MAX_BYTES:
            raise UserError(f"{path} has a header of {length:,} bytes, which no safetensors file has: {AGAIN}")
        return file.read(length)


def parse_header(header: bytes, where: str, remedy: str = AGAIN) -> dict[str, HeaderItem]:
    """The tensors that a header names, in the order of the file; `where` is how errors call the file.

    Raises:
        UserError: no header, a tensor without dtype, shape or place, tensors that overlap or leave gaps.
    """
    items: dict[str, Any] = parse_json(header, dict[Name, Any], where, remedy)
    check(items.pop("__metadata__", {}), dict[str, str], f"{where}: __metadata__", remedy)
    check(items, dict[Name, HeaderItem], where, remedy)
    end = 0
    ordered = sorted(items.items(), key=lambda item: item[1]["data_offsets"])
    for name, item in ordered:
        start, stop = item["data_offsets"]
        if start != end or stop < start:
            what = "leaves a gap" if start > end else "lies over another tensor" if stop >= start else "ends before it"
            raise UserError(f"{where}: {name} {what}, from byte {start} to {stop} of the values; {remedy}")
        end = stop
    return dict(ordered)


def parse_index(text: bytes, path: Path) -> dict[str, str]:
    """Tensor -> file of an index. Raises `UserError` when it is none."""
    return parse_json(text, IndexFile, str(path), AGAIN)["weight_map"]
