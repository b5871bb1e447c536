"""What FP8 does to activations and to attention's cache, computed in transformers' model on any device. Torch only.

A server with static scales rounds the input of every FP8 matrix to E4M3, and so does its cache with keys and values.
`conversion/dequantize.py` writes the scales of both beside the plain weights, as `fp8_activations.json`; whoever loads
the folder as the reference (`evaluation/hf_model.py`) gets a model that rounds as the server would.

Rounded are: the inputs of FP8 matrices, saturating at the largest code as vLLM's kernels do (csrc/quantization/w8a8/
fp8/common.cuh), routed experts of a layer with the largest of their scales (its fused MoE takes that), keys and values
as they go into the cache. Not rounded are queries and the attention's probabilities, which some attention kernels turn
into FP8 too (FlashAttention 3 does), and nothing is summed in the order of a tensor core.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from nano3.documents import AboveZero, Name, read_json
from nano3.hf_config import FP8_ACTIVATIONS
from nano3.reference_linears import After, Before, tap_layer, tap_model

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""Largest value of FP8 E4M3: 448."""


def rounded(value: torch.Tensor, scale: float) -> torch.Tensor:
    """`value`, any shape, as E4M3 at `scale` holds it, in its own dtype; what is too large becomes 448 * scale."""
    codes = (value.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(value.dtype)


class ScalesFile(TypedDict):
    """fp8_activations.json."""

    inputs: dict[Name, AboveZero]
    cache: dict[Name, AboveZero]


@dataclass(frozen=True)
class ActivationScales:
    """Module name -> scale of its input; names of key and value projections -> scale of what they put in the cache."""

    inputs: dict[str, float]
    cache: dict[str, float]

    @classmethod
    def shared(cls, inputs: dict[str, float], cache: dict[str, float]) -> ActivationScales:
        """With the largest scale of a layer's routed experts for all of them, up and down each."""
        largest: dict[tuple[str, str], float] = {}
        for name, scale in inputs.items():
            largest[_group(name)] = max(scale, largest.get(_group(name), 0.0))
        return cls({name: largest[_group(name)] for name in inputs}, cache)

    def as_served(self) -> ActivationScales:
        """With the cache's scales rounded to BF16: vLLM makes the parameters that they are loaded into in the model's
        dtype (vllm/model_executor/layers/quantization/kv_cache.py)."""
        return ActivationScales(
            self.inputs, {name: float(torch.tensor(s).bfloat16()) for name, s in self.cache.items()}
        )

    @classmethod
    def read(cls, folder: Path) -> ActivationScales | None:
        """Those of a folder, None where it has none. Raises `UserError` for a file that cannot be read."""
        path = folder / FP8_ACTIVATIONS
        if not path.exists():
            return None
        content = read_json(path, ScalesFile, "make the folder again with conversion/dequantize.py")
        return cls(content["inputs"], content["cache"])

    def write(self, folder: Path) -> None:
        """Writes the file into `folder`."""
        (folder / FP8_ACTIVATIONS).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def attach(self, model: Any) -> None:
        """Makes a transformers model round. Raises `ValueError` when it has not all the modules."""
        tap_model(model, *self._taps())

    def attach_layer(self, layer: Any, number: int) -> None:
        """The same for one layer, the `number`th of its model."""
        tap_layer(layer, number, *self._taps())

    def _taps(self) -> tuple[dict[str, Before], dict[str, After]]:
        def cached(_value: torch.Tensor, output: torch.Tensor, scale: float) -> torch.Tensor:
            return rounded(output, scale)

        before: dict[str, Before] = {name: partial(rounded, scale=scale) for name, scale in self.inputs.items()}
        after: dict[str, After] = {name: partial(cached, scale=scale) for name, scale in self.cache.items()}
        return before, after


def _group(name: str) -> tuple[str, str]:
    """Modules that share a scale: a routed expert's layer and projection; any other module is alone."""
    layer, experts, rest = name.partition(".experts.")
    return (layer, rest.rpartition(".")[2]) if experts else (name, "")
