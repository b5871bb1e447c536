"""The folders that `make check-vllm` has vLLM read, made of pico without training, in a minute.

`base`: pico in FP32. `adapter`: a small random LoRA of every matrix, one for each expert; `vllm`: the same for vLLM.
`merged`: both in one folder. `challenge`: a LoRA of the layers that PEFT and vLLM both load; `submission.zip`: what
conversion/submission.py makes of it, unpacked in `unpacked`. `fp8`: pico in FP8, calibrated on its own tasks;
`fp8-bare`: the same without a cache in FP8; `fp8-plain`: read back by us, code * scale in FP32, and what
is rounded beside it, of the cache nothing. `cache.json`: its scales. `merged.golden.safetensors`: golden answers.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from conversion.adapter import export
from conversion.dequantize import dequantize
from conversion.fp8.selection import Selection
from conversion.golden import encode, golden
from conversion.merge_lora import merge
from conversion.quantize_fp8 import quantize
from conversion.submission import write_submission
from nano3.arch import PRESETS, Arch
from nano3.fp8_emulation import ActivationScales
from nano3.sealed_folder import seal
from nano3.targets import PRESETS as TARGETS
from pico.tasks import DEMO, PRETRAINING, rows
from tests.conversion.test_merge import write_adapter

TASKS = ("sort_ascending", "reverse_words", "count_letters")


def questions(each: int, seed: int) -> list[dict[str, Any]]:
    """Chat rows of every kind of task that pico knows, and of the demo's."""
    tasks = [task for task, _ in PRETRAINING.values()] + [DEMO]
    return [row for task in tasks for row in rows(task, each, seed=seed)]


def small_values(tensors: dict[str, torch.Tensor]) -> None:
    """An adapter that changes every module, and many of pico's answers, but leaves it answering."""
    generator = torch.Generator().manual_seed(1)
    for key, tensor in tensors.items():
        tensors[key] = 0.06 * torch.randn(tensor.shape, generator=generator)


def make(folder: Path) -> None:
    """Writes all of them into `folder`."""
    pico, base = PRESETS["pico"], folder / "base"
    shutil.copytree(pico, base)
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    save_file({n: t.float() for n, t in load_file(pico / "model.safetensors").items()}, base / "model.safetensors")
    write_adapter(folder / "adapter", small_values, config=config, experts="each")
    export(folder / "adapter", folder / "vllm", "vllm")
    merge(base, folder / "adapter", folder / "merged")
    write_adapter(folder / "challenge", small_values, config=config, targets=TARGETS["peft"])
    write_submission(folder / "challenge", folder / "submission.zip")
    with zipfile.ZipFile(folder / "submission.zip") as packed:
        packed.extractall(folder / "unpacked")
    asked = [row for task in TASKS for row in rows(PRETRAINING[task][0], 4, 7)]
    _, tokens = encode(pico, asked)
    quantize(pico, folder / "fp8", Selection.published(Arch.load(pico)), tokens)
    _bare(folder / "fp8", folder / "fp8-bare")
    _plain(folder)
    golden(folder / "merged", asked, folder / "beside").write(folder / "merged.golden.safetensors")


def _bare(fp8: Path, out: Path) -> None:
    """The same folder, whose two configurations leave the cache as it is."""
    shutil.copytree(fp8, out)
    for name, part, key in (
        ("config.json", "quantization_config", "kv_cache_scheme"),
        ("hf_quant_config.json", "quantization", "kv_cache_quant_algo"),
    ):
        config = json.loads((out / name).read_text())
        del config[part][key]
        (out / name).write_text(json.dumps(config))


def _plain(folder: Path) -> None:
    """`dequantize` writes BF16, as a checkpoint for others should be. vLLM multiplies with the scales in FP32."""
    plain = folder / "fp8-plain"
    dequantize(folder / "fp8", plain)
    codes, tensors = load_file(folder / "fp8" / "model.safetensors"), load_file(plain / "model.safetensors")
    for name, code in codes.items():
        if code.dtype == torch.float8_e4m3fn:
            tensors[name] = code.float() * codes[f"{name}_scale"].float()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    scales = ActivationScales.read(plain)
    assert scales is not None
    ActivationScales(scales.inputs, {}).write(plain)
    (folder / "cache.json").write_text(json.dumps(scales.cache))
    seal(plain)
