"""Run by tests/nano3/test_extra_state.py: strict loads of checkpoints with Transformer Engine's `_extra_state`.

python -m tests.helpers.extra_state_probe FOLDER      (FOLDER/nemo is a checkpoint of conversion/hf_to_nemo.py)

Writes FOLDER/fp8/weights, the same model as an FP8 run would save it, and FOLDER/results.json.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from tests.helpers.mcore_model import build, join_alone, sharded_parts  # first: it switches the CPU backend on

# isort: split

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling

from nano3.arch import Arch
from nano3.cpu.te.base import TransformerEngineBaseModule

RECORD = Path(__file__).with_name("te_extra_state.json")


def load(model: Any, weights: Path) -> dict[str, Any]:
    """Loads with nothing missing and nothing unexpected, neither in the file nor in the model; returns its values."""
    state = dist_checkpointing.load(
        model.sharded_state_dict(prefix="module."), str(weights), strict=StrictHandling.RAISE_ALL
    )
    loaded = {key.removeprefix("module."): value for key, value in state.items()}
    extras = [value for key, value in loaded.items() if "_extra_state" in key]
    sizes = {value.numel() for value in extras if isinstance(value, torch.Tensor)}
    model.load_state_dict(loaded, strict=True)
    return {"extra_states": len(extras), "bytes": sorted(sizes), "digest": digest(model)}


def digest(model: Any) -> float:
    """Changes when any parameter does, or two are exchanged."""
    values = [p for _, p in sorted(model.named_parameters())]
    return sum((n + 1) * float(p.double().square().sum()) for n, p in enumerate(values))


def main() -> None:
    folder = Path(sys.argv[1])
    join_alone()
    arch = Arch.load(folder / "hf")
    model, second = (build(arch, 128, torch.float32) for _ in range(2))
    plain = torch.nn.Module.get_extra_state
    asking = {n: type(m).__name__ for n, m in model.named_modules() if type(m).get_extra_state is not plain}
    objects = sorted(part.unique_key for part in sharded_parts(model) if isinstance(part, ShardedObject))
    results: dict[str, Any] = {"modules": asking, "objects": objects, "ours": load(model, folder / "nemo" / "weights")}

    state = torch.frombuffer(
        bytearray(base64.b64decode(json.loads(RECORD.read_text())["fp8_state"])), dtype=torch.uint8
    )
    empty = TransformerEngineBaseModule.get_extra_state
    TransformerEngineBaseModule.get_extra_state = lambda _: state  # type: ignore[method-assign]
    (folder / "fp8" / "weights").mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(prefix="module."), str(folder / "fp8" / "weights"))
    TransformerEngineBaseModule.get_extra_state = empty  # type: ignore[method-assign]
    results["fp8"] = load(second, folder / "fp8" / "weights")
    results["state_bytes"] = state.numel()
    try:  # a checkpoint without one of the keys must not pass: the load is strict
        spoiled = model.sharded_state_dict(prefix="module.")
        del spoiled["module.decoder.final_norm._extra_state"]
        dist_checkpointing.load(spoiled, str(folder / "fp8" / "weights"), strict=StrictHandling.RAISE_ALL)
    except Exception as error:
        results["spoiled"] = str(error)
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
