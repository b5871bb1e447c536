"""Inputs of bench_conversion.py: a random model with real shapes, and an adapter that fits it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conversion.checkpoint.output_folder import HF_KIND, unfinished_output
from conversion.checkpoint.pieces import PIECE, in_parallel
from conversion.checkpoint.plan import PREFIX
from conversion.checkpoint.safetensors_layout import FileLayout
from conversion.checkpoint.safetensors_writer import SafetensorsWriter
from conversion.checkpoint.torch_dist_writer import BACKENDS
from nano3.arch import Arch
from nano3.sealed_folder import seal
from nano3.targets import PRESETS, select
from nano3.tensor_names import adaptable, adapter_shapes

RANK = 32
"""Of the adapters: NVIDIA's published recipe."""


def shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The configuration with its first `layers` layers only."""
    pattern = config["hybrid_override_pattern"][:layers]
    return config | {"hybrid_override_pattern": pattern, "num_hidden_layers": layers}


def write_model(folder: Path, config: dict[str, Any]) -> int:
    """A model of `config` with random values between 2**-8 and 2**-6 in size, so BF16 and FP32 alike; its bytes."""
    layout = FileLayout.make(
        {name: (spec.dtype, spec.shape) for name, spec in Arch.from_config(config).tensors().items()}
    )
    shutil.rmtree(folder, ignore_errors=True)
    with unfinished_output(folder, HF_KIND, {"tool": "random", "config": config}, layout.total_bytes) as work:
        (work.folder / "config.json").write_text(json.dumps(config))
        with SafetensorsWriter(work, layout) as writer:

            def fill(name: str) -> None:
                entry = layout.entries[name]
                number, size = list(layout.entries).index(name), entry.stop - entry.start
                for begin in range(0, size, PIECE):
                    writer.put(name, _random(min(PIECE, size - begin), entry.dtype, (number, begin)))
                writer.done(name)

            in_parallel(writer.todo, fill)
    return layout.total_bytes


def _random(size: int, dtype: str, seed: tuple[int, int]) -> memoryview:
    """Random bits with the exponent's upper seven replaced, which are the same in BF16 and FP32."""
    import numpy as np

    kind, keep, exponent = (np.uint16, 0x80FF, 0x3B00) if dtype == "BF16" else (np.uint32, 0x80FFFFFF, 0x3B000000)
    values: Any = np.random.default_rng(seed).integers(0, 1 << 64, size=-(-size // 8), dtype=np.uint64).view(kind)
    values &= kind(keep)
    values |= kind(exponent)
    return memoryview(values.view(np.uint8)[:size])


def write_adapter(folder: Path, config: dict[str, Any], preset: str) -> Path:
    """An adapter of rank `RANK` on the targets of a preset, written by PyTorch's own checkpoint code."""
    import torch
    import torch.distributed.checkpoint as dcp

    arch, targets = Arch.from_config(config), list(PRESETS[preset])
    generator = torch.Generator().manual_seed(0)
    linears = adaptable(arch)
    tensors = {}
    for path in select(arch, targets, "shared"):
        linear = linears[path]
        prefix = f"{PREFIX}{path.removesuffix(linear.module)}{linear.module_key}.adapter."
        for name, shape in adapter_shapes(linear, RANK, False, False).items():
            tensors[prefix + name] = torch.randn(shape, generator=generator) * 0.01
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(tensors, checkpoint_id=folder / "weights", no_dist=True)
    (folder / "weights" / "metadata.json").write_text(json.dumps(BACKENDS))
    facts = {
        "format": 2,
        "rank_pattern": [],
        "alpha_pattern": [],
        "rslora": False,
        "dora": False,
        "rank": RANK,
        "alpha": 64,
        "targets": targets,
        "experts": "shared",
        "base_config": config,
    }
    (folder / "lora.json").write_text(json.dumps(facts))
    seal(folder)
    return folder
