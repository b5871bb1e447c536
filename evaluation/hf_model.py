"""Loads a Hugging Face folder with plain transformers, as the reference that everything here is compared with.

One function for every use, because transformers 5.15 and later need one correction for this model, and because loading
can go wrong without an error: tensors that the folder lacks would be filled with random numbers.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano3.cli import UserError
from nano3.hf_config import DT_RANGE, read_config
from nano3.imports import hidden, uncollected
from nano3.sealed_folder import check_seal

if TYPE_CHECKING:
    import torch

KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d")
_MODEL_CODE = "transformers.models.nemotron_h.modeling_nemotron_h"


def load_reference(folder: Path | str, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face folder in evaluation mode on the CPU, weights in `dtype`, dt not clamped.

    Returns a transformers `PreTrainedModel`. With a 16-bit `dtype` transformers rounds A_log and D too and keeps only
    the router's correction bias in FP32; compare in FP32. A folder that conversion/dequantize.py made has FP8's scales
    of activations and cache, and its model rounds both (`nano3.fp8_emulation`). Raises `UserError` when the folder is
    no model, or one of ours that is not what was written, when a file is damaged, tensors are missing or left over, or
    the weights are quantized (transformers would read their raw codes).
    """
    check_seal(Path(folder))
    quantized = read_config(folder).get("quantization_config")
    if quantized:
        raise UserError(
            f"{folder} holds weights quantized by {quantized.get('quant_method', 'an unknown method')}, which "
            "transformers would read as plain numbers; evaluate the unquantized folder"
        )
    _import_without_stand_ins()
    model = _load(folder, dtype)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = DT_RANGE
    _emulate_fp8(model, Path(folder))
    return model.eval()


def _emulate_fp8(model: Any, folder: Path) -> None:
    from nano3.fp8_emulation import ActivationScales

    scales = ActivationScales.read(folder)
    if scales is not None:
        try:
            scales.attach(model)
        except ValueError as error:
            raise UserError(f"{folder} has FP8 scales of another model: {error}") from None


def _load(folder: Path | str, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"transformers cannot load {folder}: {error}") from error
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(str(name) for name in info[problem])
            raise UserError(
                f"{folder} does not fit its config.json: {len(names)} {problem.replace('_', ' ')}, "
                f"first {names[0]}; export or download it again"
            )
    return model


def _import_without_stand_ins() -> None:
    """Imports transformers' model code so that it runs its own PyTorch formulas, or the real kernels where they are.

    The code takes `mamba_ssm` and `causal_conv1d` from wherever they are at its first import. In a process on the CPU
    backend those are this project's stand-ins (`nano3.cpu`), and the reference would run on the code that it checks.
    """
    with hidden(*(name for name in KERNEL_PACKAGES if _is_stand_in(sys.modules.get(name)))), uncollected():
        code = importlib.import_module(_MODEL_CODE)
    for name in ("causal_conv1d_fn", "mamba2_chunk_scan"):
        chosen = inspect.getclosurevars(getattr(code, name)).nonlocals.get("implementation")
        if getattr(chosen, "__module__", "").startswith("nano3."):
            raise RuntimeError(f"{_MODEL_CODE} was imported on top of the CPU stand-ins; call load_reference earlier")


def _is_stand_in(module: Any) -> bool:
    """Stand-ins are made in memory: no loader read them from a file."""
    return module is not None and getattr(module.__spec__, "loader", None) is None
