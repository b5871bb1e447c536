"""Static activation scales, layer by layer: ModelOpt's quantizers on transformers' code, one layer in memory.

Whole-model calibration needs the whole model. But a calibration run changes nothing that it passes through, so the
largest absolute values that a quantizer sees are the same when the layers come one after the other: every layer is
built alone, all samples go through it, its quantizers are read, and its outputs wait on disk for the next.

It takes days where there is no GPU: what has been seen is recorded every few samples, and a killed run goes on
there.

Memory: one layer (of Nano at most 2.6 GB, a mixture-of-experts layer in BF16) and one sample's activations. Disk: the
hidden states of all samples, 2 * tokens * hidden_size bytes (22.5 GB for Nano and 1,024 samples of 4,096 tokens).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import UnfinishedOutput
from conversion.fp8.layerwise import Hidden, build_layer, count_tokens, hidden_bytes
from conversion.fp8.selection import Selection, matrices
from nano3.cli import UserError
from nano3.imports import hidden, uncollected

_RECORD = "calibration"
_CACHE = {part: f"mixer.{part}_bmm_quantizer" for part in "kv"}


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


@dataclass
class Seen:
    """What has been seen between two blocks of samples in a layer.

    `layer` is the one in work and `blocks` how many have passed it; `largest` is the largest absolute value that each
    quantizer saw ("LAYER.path" -> value), `counts` how many tokens each routed expert of a layer got ("LAYER" -> list).
    """

    layer: int = 0
    blocks: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)

    def add(self, quantizer: str, value: float) -> None:
        """Takes the larger of `value` and what is known; what is no number stays seen."""
        self.largest[quantizer] = float(np.maximum(self.largest.get(quantizer, 0.0), value))


def scratch_bytes(hf: HFFolder, samples: list[np.ndarray]) -> int:
    """Disk that `calibrate` takes while it runs."""
    return hidden_bytes(hf, samples, torch.bfloat16)


def calibrate(
    hf: HFFolder, selection: Selection, samples: list[np.ndarray], work: UnfinishedOutput, step: Callable[[int], object]
) -> Activations:
    """Runs `samples`, token ids (n,) each, through the model of `hf`, in BF16, as it will be served.

    Goes on from what a killed run of the same job left in `work`. Meanwhile the hidden states lie there.

    Args:
        step: is told how many tokens passed a layer: first those of the killed run, then those of every block.

    Raises:
        UserError: a quantizer saw nothing, or something that is no number.
    """
    hidden = Hidden(hf, samples, work.scratch(_RECORD), torch.bfloat16)
    lengths = [sum(map(len, block)) for block in hidden.blocks]
    recorded = work.recorded(_RECORD)
    seen = Seen(**recorded or {})
    if recorded is None:
        hidden.embed()
        work.record(_RECORD, asdict(seen))

    def passed(block: int) -> None:
        seen.blocks = block + 1
        work.record(_RECORD, asdict(seen))
        step(lengths[block])

    hidden.settle(seen.blocks)
    step(seen.layer * sum(lengths) + sum(lengths[: seen.blocks]))
    while seen.layer < len(hf.arch.layers):
        if seen.blocks < len(lengths):
            _calibrate_layer(hf, selection, hidden, seen, passed)
        seen.layer, seen.blocks = seen.layer + 1, 0
        work.record(_RECORD, asdict(seen))
    hidden.remove()
    return _activations(selection, seen, sum(lengths))


def _calibrate_layer(
    hf: HFFolder, selection: Selection, hidden: Hidden, seen: Seen, passed: Callable[[int], None]
) -> None:
    """The rest of the blocks through the layer in work; `passed` gets the number of each, once `seen` knows of it."""
    number = seen.layer
    model = build_layer(hf, number, torch.bfloat16)
    counts = torch.tensor(seen.counts.get(str(number), [0] * hf.arch.n_routed_experts))
    routed = hf.arch.layers[number] == "E"

    def look(block: int) -> None:
        for path in _quantizers(selection, number):
            seen.add(f"{number}.{path}", _amax(model, path))
        if routed:
            seen.counts[str(number)] = counts.tolist()
        passed(block)

    with ExitStack() as stack:
        if routed:
            stack.callback(count_tokens(model, counts))
        stack.enter_context(redirect_stdout(io.StringIO()))  # "Inserted 27 quantizers", for every layer
        mtq = stack.enter_context(_modelopt())
        config = {**mtq.FP8_DEFAULT_CFG, "quant_cfg": _rules(selection, number)}
        mtq.quantize(model, config, lambda layer: hidden.pass_through(layer, seen.blocks, look))


def _activations(selection: Selection, seen: Seen, tokens: int) -> Activations:
    """What the quantizers saw, by module. Raises `UserError` (see `calibrate`)."""

    def largest(module: str) -> float:
        _, _, number, path = module.split(".", 3)
        return seen.largest[f"{number}.{_quantizer(path)}"]

    found = Activations({module: largest(module) for module in selection.chosen}, tokens=tokens)
    for number in selection.kv_layers:
        found.cache |= {(number, part): seen.largest[f"{number}.{_CACHE[part]}"] for part in "kv"}
    found.idle = {int(number): counts.count(0) for number, counts in seen.counts.items()}
    _check(selection, found)
    return found


def _quantizers(selection: Selection, number: int) -> list[str]:
    """Paths of the input quantizers of this layer that the selection asks for."""
    prefix = f"backbone.layers.{number}."
    names = {_quantizer(name.removeprefix(prefix)) for name in selection.chosen if name.startswith(prefix)}
    return sorted(names | set(_CACHE.values() if number in selection.kv_layers else ()))


def _rules(selection: Selection, number: int) -> list[dict[str, Any]]:
    """ModelOpt's rules for the quantizers of this layer that the selection asks for.

    Weight quantizers stay off: a weight's scale needs no samples and is taken when it is written.
    """
    on = {"cfg": {"num_bits": (4, 3), "axis": None}, "enable": True}
    rules = [{"quantizer_name": f"*{name}", **on} for name in _quantizers(selection, number)]
    return [{"quantizer_name": "*", "enable": False}, *rules]


@contextmanager
def _modelopt() -> Iterator[Any]:
    """ModelOpt's quantization, without its plugins for Megatron: when loaded and when used it would import that."""
    with hidden("megatron", "nemo", "transformer_engine"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tests/conversion/test_fp8.py has tried it with this transformers
        with uncollected():
            import modelopt.torch.quantization as mtq

        yield mtq


def _quantizer(module: str) -> str:
    """Path of a module's input quantizer within its layer; all routed experts of a layer share one per projection."""
    parts = module.split(".")
    if parts[1] == "experts":
        return f"mixer.experts.{parts[-1]}_input_quantizer"
    return f"{module}.input_quantizer"


def _amax(model: Any, path: str) -> float:
    """The largest absolute value that a quantizer's calibrator has collected so far; NaN when it saw nothing."""
    amax = model.layers[0].get_submodule(path)._calibrator.compute_amax()
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
