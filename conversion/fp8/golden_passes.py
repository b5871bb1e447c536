"""Log-probabilities of prompts by transformers' code, layer by layer: of a model read right, and of one with a fault.

What servers keep in BF16 whatever they compute in is rounded here too, in FP32 as well: `D` of the Mamba mixers, and
the scales of the cache (`ActivationScales.as_served`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.safetensors_layout import FP8
from nano3.outputs import scratch_folder

if TYPE_CHECKING:
    import torch

    from conversion.fp8.layerwise import Hidden
    from nano3.fp8_emulation import ActivationScales

Spoil = Callable[[Any, int], None]
"""Changes a layer, built alone (`layerwise.build_layer`), by its number."""


@dataclass(frozen=True)
class Way:
    """A way to compute the answers: in which dtype, with what rounded to FP8, with which fault."""

    dtype: torch.dtype
    scales: ActivationScales | None
    spoil: Spoil | None = None


@dataclass(frozen=True)
class Answers:
    """Log-probabilities (tokens,) of each prompt in FP32, 0 for its first token; and how many tokens each routed expert
    got, by layer."""

    logprobs: list[np.ndarray]
    counts: dict[int, np.ndarray]

    @property
    def reached(self) -> int:
        """Routed experts that got a token."""
        return sum(int((counts > 0).sum()) for counts in self.counts.values())


def answers(hf: HFFolder, tokens: list[np.ndarray], way: Way, beside: Path) -> Answers:
    """The log-probability of every token given those before it, for prompts of token ids.

    One layer of weights is in memory at a time. Hidden states lie in a hidden folder beside the path `beside`.
    """
    from tqdm import tqdm

    from conversion.fp8.layerwise import Hidden

    counts: dict[int, np.ndarray] = {}
    with scratch_folder(beside) as scratch:
        hidden = Hidden(hf, tokens, scratch, way.dtype)
        hidden.embed()
        name = str(way.dtype).removeprefix("torch.")
        for number in tqdm(range(len(hf.arch.layers)), desc=f"golden {name}", unit="layer", disable=None):
            _through_layer(hf, hidden, number, way, counts)
        return Answers([_of_prompt(hf, state, ids) for state, ids in zip(hidden, tokens, strict=True)], counts)


def _through_layer(hf: HFFolder, hidden: Hidden, number: int, way: Way, counts: dict[int, np.ndarray]) -> None:
    """One layer, which is let go of before the next is built; counts the tokens of its routed experts."""
    import torch

    from conversion.fp8.layerwise import build_layer, count_tokens

    model = build_layer(hf, number, hidden.dtype)
    mixer = model.layers[0].mixer
    if hasattr(mixer, "D"):
        mixer.D.data = mixer.D.data.bfloat16().to(mixer.D.dtype)
    found = torch.zeros(hf.arch.n_routed_experts, dtype=torch.long)
    if hf.arch.layers[number] == "E":
        count_tokens(model, found)
    if way.scales is not None:
        way.scales.attach_layer(model.layers[0], number)
    if way.spoil is not None:
        with torch.no_grad():
            way.spoil(model, number)
    hidden.pass_through(model)
    if hf.arch.layers[number] == "E":
        counts[number] = found.numpy()


def _of_prompt(hf: HFFolder, hidden: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    """The last norm and lm_head, a few rows of the vocabulary at a time."""
    import torch

    from conversion.checkpoint.pieces import row_steps

    arch, state = hf.arch, hidden[:-1].float()
    norm = hf.rows("backbone.norm_f.weight", 0, arch.hidden_size).to(hidden.dtype).float()
    state = state * torch.rsqrt(state.square().mean(-1, keepdim=True) + arch.layer_norm_epsilon) * norm
    state, wanted = state.to(hidden.dtype), torch.from_numpy(ids[1:])
    total = torch.full((len(state),), -torch.inf)
    chosen = torch.zeros(len(state))
    for start, count in row_steps(arch.vocab_size, 4 * arch.hidden_size):
        part = (state @ hf.rows("lm_head.weight", start, count).to(hidden.dtype).T).float()
        total = torch.logaddexp(total, part.logsumexp(1))
        inside = (wanted >= start) & (wanted < start + count)
        chosen[inside] = part[inside, wanted[inside] - start]
    return torch.cat([torch.zeros(1), chosen - total]).numpy()


def planted(hf: HFFolder, scales: ActivationScales | None, exact: Answers) -> dict[str, Way]:
    """Servers with a fault each, in BF16, by what is wrong: what the golden answers should tell from a right one.

    `exact` are the right answers, whose counts say which experts the prompts reach.
    """
    import torch

    from nano3.fp8_emulation import ActivationScales

    found: dict[str, Way] = {}
    if scales is not None:
        found["activations and cache not in FP8"] = Way(torch.bfloat16, None)
        found["cache not in FP8"] = Way(torch.bfloat16, ActivationScales(scales.inputs, {}))
        name = _middle_matrix(hf)
        found[f"the scale of {name} doubled"] = Way(torch.bfloat16, scales, partial(_double, name))
    layers = [number for number, counts in sorted(exact.counts.items()) if (counts > 0).sum() > 1]
    if layers:
        layer = layers[len(layers) // 2]
        pair = _usual_experts(exact.counts[layer])
        says = f"experts {pair[0]} and {pair[1]} of layer {layer} swapped"
        found[says] = Way(torch.bfloat16, scales, partial(_swap, layer, pair))
    return found


def _middle_matrix(hf: HFFolder) -> str:
    """The FP8 matrix in the middle of the model that every token passes."""
    names = [name.removesuffix(".weight") for name, entry in hf.layout.entries.items() if entry.dtype == FP8]
    own = sorted((int(name.split(".")[2]), name) for name in names if ".experts." not in name)
    return own[len(own) // 2][1]


def _usual_experts(counts: np.ndarray) -> tuple[int, int]:
    """Two experts with as many tokens as the median of those that got any: neither the busiest nor the idlest."""
    reached = [int(expert) for expert in np.argsort(counts, kind="stable") if counts[expert] > 0]
    middle = max(1, len(reached) // 2)
    return reached[middle - 1], reached[middle]


def _double(name: str, model: Any, number: int) -> None:
    _, _, layer, path = name.split(".", 3)
    if int(layer) == number:
        model.layers[0].get_submodule(path).weight.mul_(2)


def _swap(layer: int, pair: tuple[int, int], model: Any, number: int) -> None:
    if layer == number:
        experts = model.layers[0].mixer.experts
        for weight in (experts.up_proj, experts.down_proj):
            weight[list(pair)] = weight[list(reversed(pair))].clone()
