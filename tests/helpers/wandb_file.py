"""Reads a W&B transaction log (`run-ID.wandb`): LevelDB's log format over W&B's protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, b":W&B"


def records(path: Path) -> Iterator[bytes]:
    """Whole records of a log whose header is `:W&B`, a magic number and a version; a torn end is left out."""
    data = path.read_bytes()
    assert data[:4] == HEADER, data[:8]
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:  # too short for a header: padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0 or place + 7 + length > len(data):
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history(path: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Ids of the runs in a log, and its rows with their `_step`."""
    from wandb.proto import wandb_internal_pb2 as proto

    ids: set[str] = set()
    rows = []
    for data in records(path):
        record = proto.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            ids.add(record.run.run_id)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({**items, "_step": record.history.step.num})
    return ids, rows
