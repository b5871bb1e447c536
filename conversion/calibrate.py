"""Static activation scales, layer by layer: ModelOpt's quantizers on transformers' code, one layer in memory.

Whole-model calibration needs the whole model. But a calibration run changes nothing that it passes through, so the
largest absolute values that a quantizer sees are the same when the layers come one after the other: every layer is
built alone, all samples go through it, its quantizers are read, and its outputs wait on disk for the next.

Memory: one layer (of Nano at most 2.6 GB, a mixture-of-experts layer in BF16) and one sample's activations. Disk: the
hidden states of all samples, 2 * tokens * hidden_size bytes (22.5 GB for Nano and 1,024 samples of 4,096 tokens).
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from conversion.fp8 import Selection, matrices
from conversion.safetensors_io import HFFolder
from nano3.cli import UserError
from nano3.hf_config import BLOCK_TYPES, DT_RANGE
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
    """Disk that `calibrate` takes while it runs: the hidden states of all samples in BF16, and their files' headers."""
    return sum(2 * len(sample) * hf.arch.hidden_size + 128 for sample in samples)


def calibrate(
    hf: HFFolder, selection: Selection, samples: list[np.ndarray], beside: Path, step: Callable[[], None]
) -> Activations:
    """Runs `samples`, token ids (n,) each, through the model of `hf`; calls `step` after every layer.

    Hidden states lie in a hidden folder beside the path `beside` meanwhile.

    The model is what `from_pretrained(dtype=bfloat16)` makes of the folder, less its clamped time step: BF16 but for
    the router's correction bias. Raises `UserError` when a quantizer saw nothing, or something that is no number.
    """
    found = Activations(tokens=sum(len(sample) for sample in samples))
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.calibration-", dir=beside.parent) as scratch:
        hidden = [Path(scratch) / f"{number}.npy" for number in range(len(samples))]
        for sample, path in zip(samples, hidden, strict=True):
            rows = torch.cat([hf.rows("backbone.embeddings.weight", int(token), 1) for token in sample])
            _store(path, rows.bfloat16())
        for number in range(len(hf.arch.layers)):
            _calibrate_layer(hf, selection, number, hidden, found)
            step()
    _check(selection, found)
    return found


def _calibrate_layer(hf: HFFolder, selection: Selection, number: int, hidden: list[Path], found: Activations) -> None:
    model = _layer(hf, number)
    counts = torch.zeros(hf.arch.n_routed_experts, dtype=torch.long)

    def forward(module: Any) -> None:
        with torch.no_grad():
            for path in hidden:
                output = module(inputs_embeds=_load(path)[None], use_cache=False)
                _store(path, output.last_hidden_state[0])

    with ExitStack() as stack:
        if hf.arch.layers[number] == "E":
            stack.callback(_count_tokens(model, counts).remove)
        stack.enter_context(redirect_stdout(io.StringIO()))  # "Inserted 27 quantizers", for every layer
        _modelopt().quantize(model, _config(selection, number), forward)
    prefix = f"backbone.layers.{number}."
    for name in (module for module in selection.chosen if module.startswith(prefix)):
        found.inputs[name] = _amax(model, _quantizer(name.removeprefix(prefix)))
    if number in selection.kv_layers:
        for part in "kv":
            found.cache[number, part] = _amax(model, f"mixer.{part}_bmm_quantizer")
    if hf.arch.layers[number] == "E":
        found.idle[number] = int((counts == 0).sum())


def _layer(hf: HFFolder, number: int) -> Any:
    """transformers' model with this layer as its only one: hidden states go in, the layer's output comes out."""
    from transformers import NemotronHConfig, NemotronHModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says for every layer that the plain formulas are slow

    raw = json.loads((hf.path / "config.json").read_text())
    letter = hf.arch.layers[number]
    kind = next(word for word, known in BLOCK_TYPES.items() if known == letter)
    raw = {key: value for key, value in raw.items() if key not in ("hybrid_override_pattern", "num_hidden_layers")}
    config = NemotronHConfig(**{**raw, "layers_block_type": [kind], "num_hidden_layers": 1})
    config._experts_implementation = "eager"  # the only one that ModelOpt can look into
    with torch.device("meta"):
        model: Any = NemotronHModel(config)
    model.norm_f = nn.Identity()
    model.layers[0].load_state_dict(_weights(hf, number), assign=True)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = DT_RANGE
    return model.eval()


def _weights(hf: HFFolder, number: int) -> dict[str, torch.Tensor]:
    """The layer's state in transformers' names: experts stacked, all in BF16 but the router's correction bias."""
    prefix, state = f"backbone.layers.{number}.", {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, spec in hf.arch.tensors().items():
        if not name.startswith(prefix):
            continue
        value = hf.rows(name, 0, spec.shape[0])
        if not name.endswith("e_score_correction_bias"):
            value = value.bfloat16()
        short = name.removeprefix(prefix)
        if ".experts." in short:
            stacks.setdefault(f"mixer.experts.{short.split('.')[-2]}", []).append(value)
        else:
            state[short] = value
    return state | {name: torch.stack(parts) for name, parts in stacks.items()}


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


def _count_tokens(model: Any, counts: torch.Tensor) -> Any:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], _output: Any) -> None:
        counts.add_(torch.bincount(arguments[1].flatten(), minlength=len(counts)))

    return model.layers[0].mixer.experts.register_forward_hook(hook)


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


def _store(path: Path, value: torch.Tensor) -> None:
    np.save(path, value.contiguous().view(torch.int16).numpy())


def _load(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path)).view(torch.bfloat16)
