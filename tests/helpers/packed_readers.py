"""NeMo 2's and Megatron-Bridge's own readers of packed sequences, out of their sources, without importing either."""

from __future__ import annotations

import bisect
import glob
import importlib.util
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.helpers.foreign import take

EOS = 2
"""What their readers pad with."""
BRIDGE = "megatron/bridge/data/packing"
LOCAL_FILES = SimpleNamespace(is_enabled=lambda: False)
"""In place of Megatron-Core's switch for object stores."""
GIVEN: dict[str, Any] = {
    "np": np, "torch": torch, "json": json, "Path": Path, "logger": logging.getLogger(__name__),
    "MultiStorageClientFeature": LOCAL_FILES,
}  # fmt: skip


def nemo_source() -> str:
    """The file of the installed NeMo that has its data sets."""
    found = importlib.util.find_spec("nemo")
    assert found is not None
    (folder,) = found.submodule_search_locations or []
    return str(Path(folder) / "collections" / "llm" / "gpt" / "data" / "core.py")


def base_class(seq_length: int) -> type:
    """What both packed data sets stand on: NeMo's collating helpers, without the reading of text."""
    helpers = ("__len__", "_ceil_to_nearest", "_collate_item", "_maybe_cast_to_list")
    theirs = take(nemo_source(), {"GPTSFTDataset": helpers}, **GIVEN)["GPTSFTDataset"]

    class Base(theirs):  # type: ignore[misc, valid-type]
        def __init__(self, file_path: str, tokenizer: Any) -> None:
            self.file_path, self.tokenizer, self.max_seq_length = file_path, tokenizer, seq_length
            self.pad_to_max_length = self.answer_only_loss = True
            self.virtual_tokens, self.max_num_samples = 0, None
            self._load_dataset()
            self._build_samples_mapping()

    return Base


def nemo(file: Path, seq_length: int) -> Any:
    """`GPTSFTPackedDataset` of the installed NeMo on a file."""
    base = base_class(seq_length)
    made = take(nemo_source(), {"GPTSFTPackedDataset": ()}, GPTSFTDataset=base, **GIVEN)["GPTSFTPackedDataset"]
    return made(str(file), SimpleNamespace(eos_id=EOS))


def bridge(file: Path, seq_length: int) -> Any:
    """Megatron-Bridge's `GPTSFTPackedParquetDataset` on a file."""
    paths = {"_resolve_parquet_paths": (), "_is_parquet_file": ()}
    found = take(f"{BRIDGE}/paths.py", paths, glob=glob, time=time, **GIVEN)
    base = take(
        f"{BRIDGE}/gpt_sft.py",
        {"GPTSFTPackedDataset": ()},
        GPTSFTDataset=base_class(seq_length),
        _safe_load_packed_npy=None,
        **GIVEN,
    )
    made = take(
        f"{BRIDGE}/parquet.py",
        {"GPTSFTPackedParquetDataset": (), "_lazy_import_pyarrow": (), "REQUIRED_COLUMNS": ()},
        bisect=bisect,
        GPTSFTPackedDataset=base["GPTSFTPackedDataset"],
        _resolve_parquet_paths=found["_resolve_parquet_paths"],
        **GIVEN,
    )
    return made["GPTSFTPackedParquetDataset"](str(file), SimpleNamespace(eos_id=EOS))
