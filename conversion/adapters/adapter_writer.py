"""An adapter folder of ours, written: whole tensors as PyTorch's checkpoint, which training reads on any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from conversion.checkpoint.output_folder import WEIGHTS, require_space
from conversion.checkpoint.torch_dist_writer import BACKENDS
from nano3.outputs import fresh_output

KIND = "lora-adapter"


def write_adapter(out: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Writes `tensors`, by the keys of `nano3/tensor_names.py`, and `facts` as lora.json; seals the folder.

    Raises `UserError` when the disk is too small, or `out` is somebody else's.
    """
    require_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    with fresh_output(out, KIND) as target:
        weights = target / WEIGHTS
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(weights, single_file_per_rank=True), no_dist=True)
        # The two files that make Megatron-Core read it.
        torch.save({}, weights / "common.pt")
        (weights / "metadata.json").write_text(json.dumps(BACKENDS))
        (target / "lora.json").write_text(json.dumps(facts, indent=1) + "\n")
