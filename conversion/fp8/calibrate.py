"""Static activation scales, layer by layer: ModelOpt's quantizers on transformers' code, one layer in memory.

Whole-model calibration needs the whole model. But a calibration run changes nothing that it passes through, so the
largest absolute values that a quantizer sees are the same when the layers come one after the other: every layer is
built alone, all samples go through it, its quantizers are read, and its outputs wait on disk for the next.

Memory: one layer (of Nano at most 2.6 GB, a mixture-of-experts layer in BF16) and one sample's activations. Disk: the
hidden states of all samples, 2 * tokens * hidden_size bytes (22.5 GB for Nano and 1,024 samples of 4,096 tokens).
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conversion.checkpoint.safetensors_io import HFFolder
from conversion.fp8.layerwise import Hidden, build_layer, count_tokens, hidden_bytes
from conversion.fp8.selection import Selection, matrices
from nano3.cli import UserError, hidden_prefix
from nano3.imports import hidden


@dataclass
class Activations:
    """What calibration found: module name -> largest absolute input; (layer, "k" or "v") -> that of the cache.

    `idle` counts the experts of each layer that no token reached. They share their layer's input scale, so they have
    one, but no evidence that it suits them.
    """

    inputs: dict[str, float] = field(default_factory=dict)
    cache: dict[tuple[int, str], float] = field(default_factory=dict)
    idle: dict[int, int] = field(default_factory=dict)
    tokens: int = 0


def scratch_bytes(hf: HFFolder, samples: list[np.ndarray]) -> int:
    """Disk that `calibrate` takes while it runs."""
    return hidden_bytes(hf, samples, torch.bfloat16)


def calibrate(
    hf: HFFolder, selection: Selection, samples: list[np.ndarray], beside: Path, step: Callable[[], None]
) -> Activations:
    """Runs `samples`, token ids (n,) each, through the model of `hf`; calls `step` after every layer.

    Hidden states lie in a hidden folder beside the path `beside` meanwhile. The model is in BF16, as it will be served.
    Raises `UserError` when a quantizer saw nothing, or something that is no number.
    """
    found = Activations(tokens=sum(len(sample) for sample in samples))
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=hidden_prefix(beside), dir=beside.parent) as scratch:
        hidden = Hidden(hf, samples, Path(scratch), torch.bfloat16)
        for number in range(len(hf.arch.layers)):
            _calibrate_layer(hf, selection, number, hidden, found)
            step()
    _check(selection, found)
    return found


def _calibrate_layer(hf: HFFolder, selection: Selection, number: int, hidden: Hidden, found: Activations) -> None:
    model = build_layer(hf, number, torch.bfloat16)
    counts = torch.zeros(hf.arch.n_routed_experts, dtype=torch.long)
    with ExitStack() as stack:
        if hf.arch.layers[number] == "E":
            stack.callback(count_tokens(model, counts))
        stack.enter_context(redirect_stdout(io.StringIO()))  # "Inserted 27 quantizers", for every layer
        _modelopt().quantize(model, _config(selection, number), hidden.pass_through)
    prefix = f"backbone.layers.{number}."
    for name in (module for module in selection.chosen if module.startswith(prefix)):
        found.inputs[name] = _amax(model, _quantizer(name.removeprefix(prefix)))
    if number in selection.kv_layers:
        for part in "kv":
            found.cache[number, part] = _amax(model, f"mixer.{part}_bmm_quantizer")
    if hf.arch.layers[number] == "E":
        found.idle[number] = int((counts == 0).sum())


def _config(selection: Selection, number: int) -> dict[str, Any]:
    """ModelOpt's FP8 configuration with the quantizers of this layer that the selection asks for.

    Weight quantizers stay off: a weight's scale needs no samples and is taken when it is written.
    """
    bits = {"num_bits": (4, 3), "axis": None}
    prefix = f"backbone.layers.{number}."
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    names = {_quantizer(name.removeprefix(prefix)) for name in selection.chosen if name.startswith(prefix)}
    if number in selection.kv_layers:
        names |= {"mixer.k_bmm_quantizer", "mixer.v_bmm_quantizer"}
    rules += [{"quantizer_name": f"*{name}", "cfg": bits, "enable": True} for name in sorted(names)]
    return {**_modelopt().FP8_DEFAULT_CFG, "quant_cfg": rules}


def _modelopt() -> Any:
    """ModelOpt's quantization, without its plugins for Megatron: they would import it, and here is no use for it."""
    with hidden("megatron", "nemo", "transformer_engine"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not been tested with this transformers; tests/test_fp8.py has
        import modelopt.torch.quantization as mtq
    return mtq


def _quantizer(module: str) -> str:
    """Path of a module's input quantizer within its layer; all routed experts of a layer share one per projection."""
    parts = module.split(".")
    if parts[1] == "experts":
        return f"mixer.experts.{parts[-1]}_input_quantizer"
    return f"{module}.input_quantizer"


def _amax(model: Any, path: str) -> float:
    quantizer = model.layers[0].get_submodule(path)
    amax = quantizer.amax
    return float("nan") if amax is None else float(amax.float())


def _check(selection: Selection, found: Activations) -> None:
    """Every scale that the selection promises has a positive finite value behind it."""
    everything = {**found.inputs, **{f"layer {n} {part} cache": value for (n, part), value in found.cache.items()}}
    bad = [name for name, value in everything.items() if not 0 < value < float("inf")]
    if bad:
        raise UserError(
            f"calibration found no usable range for {len(bad)} of {len(everything)} quantizers, first {min(bad)} "
            f"({everything[min(bad)]}); are the model's weights finite, and are there enough samples?"
        )
    assert set(found.inputs) == set(selection.chosen) <= set(matrices(selection.arch))
