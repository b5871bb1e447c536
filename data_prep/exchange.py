"""Packs as Megatron-Bridge and NeMo 2 keep them, and the token store: one row for each pack.

    input_ids      the pack's documents one after the other, with all their tokens
    seq_start_id   where each document begins
    loss_mask      0 or 1 at every token, for the token behind it: what stands at a document's last token means nothing

Our masks say of a token whether it is trained itself. So a mask is shifted by one inside each document, both ways.
A document of n tokens gives n - 1 positions there as here; both pad a pack to its length themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le, Lt, MinLen
from typing_extensions import TypedDict

from data_prep.packing import PackedDataset
from data_prep.tokens import EncodedBatch
from nano3.cli import UserError
from nano3.documents import Count, check

ROW_GROUP = 500
"""Rows that a reader holds together, as Megatron-Bridge writes them."""
FORMATS = {"megatron-bridge-parquet": ".parquet", "nemo-npy": ".npy"}
"""What can be written -> the ending by which their readers know it."""
_MAKE_AGAIN = "make the packs again with the program that wrote them"


class PackedRow(TypedDict):
    """A row of packs as others write them."""

    input_ids: Annotated[list[Annotated[int, Ge(0), Lt(1 << 31)]], MinLen(2)]
    seq_start_id: Annotated[list[Count], MinLen(1)]
    loss_mask: list[Annotated[int, Ge(0), Le(1)]]


def packed_rows(packs: PackedDataset) -> Iterator[dict[str, np.ndarray]]:
    """Every pack as a row: `input_ids` (n,) int32, `seq_start_id` (documents,) int32, `loss_mask` (n,) int8.

    Raises `UserError` for what such rows cannot say: loss weights other than 1, and documents padded inside a pack.
    """
    store = packs.store
    if store.weighted:
        raise UserError(
            f"{store.folder} has loss weights {store.manifest['weights']}; these formats know 0 and 1 only: prepare "
            "the rows without weights"
        )
    if packs.facts["pad_multiple"] != 1:
        raise UserError(f"{store.folder}: give packs of --pad-multiple 1; what reads them pads documents itself")
    for number in range(len(packs)):
        documents = packs.documents(number)
        starts, stops = store.offsets[documents], store.offsets[documents + 1]
        runs, weights = store.runs(starts.tolist(), stops.tolist())
        mask = np.concatenate([np.append(run[1:] > 0, False) for run in weights]).astype(np.int8)
        first = np.cumsum(stops - starts) - (stops - starts)
        yield {"input_ids": np.concatenate(runs), "seq_start_id": first.astype(np.int32), "loss_mask": mask}


def write_parquet(packs: PackedDataset, out: Path) -> None:
    """Megatron-Bridge's packed parquet, `ROW_GROUP` packs in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    kinds = {"input_ids": pyarrow.int32(), "seq_start_id": pyarrow.int32(), "loss_mask": pyarrow.int8()}
    schema = pyarrow.schema([(name, pyarrow.list_(kind)) for name, kind in kinds.items()])
    rows = packed_rows(packs)
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        while group := [row for _, row in zip(range(ROW_GROUP), rows, strict=False)]:
            columns = [pyarrow.array([row[name] for row in group], pyarrow.list_(kind)) for name, kind in kinds.items()]
            writer.write_table(pyarrow.table(columns, schema=schema), row_group_size=ROW_GROUP)


def write_npy(packs: PackedDataset, out: Path) -> None:
    """NeMo 2's packed file: one pickled array of rows, for which all of them must be in memory."""
    rows = np.empty(len(packs), dtype=object)
    for number, row in enumerate(packed_rows(packs)):
        rows[number] = {**row, "seq_start_id": row["seq_start_id"].tolist()}  # they add a list to it
    with out.open("wb") as file:
        np.save(file, rows, allow_pickle=True)


def documents_of(row: Any, where: str) -> EncodedBatch:
    """The documents of a row from elsewhere, with masks as our stores have them.

    Raises:
        UserError: the row is not `PackedRow`, its columns do not fit together, or a document has no token to predict.
    """
    parsed = check(row, PackedRow, where, _MAKE_AGAIN)
    tokens = np.array(parsed["input_ids"], dtype=np.int32)
    theirs = np.array(parsed["loss_mask"], dtype=np.float32)
    starts = np.array(parsed["seq_start_id"])
    lengths = np.diff(starts, append=len(tokens))
    if len(theirs) != len(tokens):
        raise UserError(f"{where}: loss_mask has {len(theirs)} values for {len(tokens)} input_ids; {_MAKE_AGAIN}")
    if starts[0] != 0 or lengths.min() < 2:
        short = int(starts[lengths.argmin()])
        raise UserError(
            f"{where}: seq_start_id must begin with 0 and give each document 2 tokens or more, but it begins with "
            f"{starts[0]}, and the document at {short} has {lengths.min()}; {_MAKE_AGAIN}"
        )
    mask = np.roll(theirs, 1)
    mask[starts] = 0
    return EncodedBatch(tokens, mask, np.zeros(len(tokens), np.uint8), lengths)
