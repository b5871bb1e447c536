"""The pattern of NeMo 2's connectors, for bench_conversion.py: MODEL OUT. Two whole models in memory, then one save.

NeMo 2.7.3 has no connector for this model (no 'E' layers), so this is a stand-in with the steps of its
`ModelConnector.apply`: `from_pretrained` loads the whole source, `init` makes the whole target, `convert_state` copies
every tensor, `nemo_save` writes a distributed checkpoint. No hash, no check for NaN, and no fsync but PyTorch's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.plan import make_plan
from conversion.checkpoint.safetensors_layout import torch_dtype


def main(source: Path, out: Path) -> None:
    """Converts `source` the way that needs twice the model."""
    with HFFolder(source) as hf:
        plan = make_plan(hf.arch, hf.dtypes)
    state = {name: value for file in sorted(source.glob("*.safetensors")) for name, value in load_file(file).items()}
    state = {name: value.clone() for name, value in state.items()}  # load_file maps the file; a model owns its weights
    target = {}
    for planned in plan.tensors:
        rows = [state[block.name][block.start : block.start + block.count] for block in planned.tensor.blocks]
        target[planned.key] = torch.zeros(planned.shape, dtype=torch_dtype(planned.dtype))
        flat = target[planned.key].view(-1, *planned.tensor.row_shape)
        torch.cat(rows, out=flat[: sum(len(part) for part in rows)])
    dcp.save(target, checkpoint_id=out, no_dist=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
