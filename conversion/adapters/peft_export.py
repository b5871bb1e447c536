"""An adapter of ours as a Hugging Face PEFT adapter: its tensors and its `adapter_config.json`, for one consumer.

Values are stored as they are, in their dtype. What a consumer has no form for is written out: an adapter that all
routed experts of a layer share becomes one for each, A of `linear_qkv` becomes the A of q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from conversion.adapters.adapter_folder import Adapter
from conversion.adapters.peft_file import MAGNITUDE, A, B
from conversion.adapters.peft_names import PARAMETERS, Part, fused_name, key, module_name, parts
from conversion.checkpoint.safetensors_layout import torch_dtype
from nano3.targets import EMBEDDING
from nano3.tensor_names import Linear


@dataclass(frozen=True)
class Piece:
    """A tensor to write: its key, dtype (safetensors' word), shape, and how to make it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Target:
    """One module of the consumer's: its name in the file, the name that patterns match, and what it covers.

    `part` is None for the stacked experts of a layer, which PEFT reaches by the parameter's name.
    """

    name: str
    pattern: str
    path: str
    part: Part | None


def targets(adapter: Adapter, consumer: str) -> Iterator[Target]:
    """The modules that an adapter has for a consumer, layer after layer."""
    for path, linear in adapter.modules.items():
        if linear.experts and consumer == "peft":
            name = fused_name(path, adapter.modules)
            parameter = PARAMETERS[path.rpartition(".")[2]]
            yield Target(name, f"{name.removesuffix('.base_layer')}.{parameter}", path, None)
            continue
        for part in parts(linear):
            name = module_name(part.tensor, consumer)
            pattern = name if part.expert is None else name.replace(f".experts.{part.expert}.", r".experts.\d+.")
            yield Target(name, pattern, path, part)


def pieces(adapter: Adapter, consumer: str) -> Iterator[Piece]:
    """All tensors, in the order of `targets`."""
    for target in targets(adapter, consumer):
        linear, rank = adapter.modules[target.path], adapter.sizes[target.path].rank
        count = linear.experts if target.part is None else 1
        rows = linear.rows if target.part is None else target.part.rows
        shapes: dict[str, tuple[int, ...]] = {A: (rank * count, linear.width), B: (rows, rank * count)}
        shapes |= {MAGNITUDE: (rows,)} if adapter.info.dora else {}
        for kind, shape in shapes.items():
            make = partial(_whole, adapter, target, kind)
            dtype = adapter.dtype(target.path, {A: "linear_in", B: "linear_out", MAGNITUDE: "magnitude"}[kind])
            name = kind
            if target.path == EMBEDDING:
                name, shape = {A: ("lora_embedding_B", shape[::-1]), B: ("lora_embedding_A", shape[::-1])}[kind]
            yield Piece(key(target.name, name), dtype, shape, make)


def config(adapter: Adapter, consumer: str) -> dict[str, Any]:
    """`adapter_config.json`. Dropout is a matter of training and left out."""
    info, sizes = adapter.info, adapter.sizes
    alphas = info.alphas(adapter.arch)
    if consumer == "vllm":
        # Its scale of routed experts is alpha / rank even with use_rslora (PackedLoRALayerWeights.pack_moe).
        alphas = {path: size.scale * size.rank for path, size in sizes.items()}
    if consumer == "vllm" or not any(size.rank == info.rank for size in sizes.values()):
        rank, alpha = next((size.rank, alphas[path]) for path, size in sizes.items())
    else:
        rank, alpha = info.rank, info.alpha
    found = list(targets(adapter, consumer))
    modules = {target.name for target in found if target.part is not None}
    parameters = {target.pattern for target in found if target.part is None}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {t.pattern: sizes[t.path].rank for t in found if sizes[t.path].rank != rank},
        "alpha_pattern": {t.pattern: _number(alphas[t.path]) for t in found if alphas[t.path] != alpha},
        "use_rslora": info.rslora and consumer != "vllm",
        "use_dora": info.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(modules),  # PEFT itself writes a set in any order
        "target_parameters": sorted(parameters) or None,
        **({"alora_invocation_tokens": info.mark} if info.mark else {}),
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _whole(adapter: Adapter, target: Target, kind: str) -> torch.Tensor:
    linear = adapter.modules[target.path]
    value = _stacked(adapter, target.path, linear, kind) if target.part is None else _part(adapter, target, kind)
    name = {A: "linear_in", B: "linear_out", MAGNITUDE: "magnitude"}[kind]
    value = value.to(torch_dtype(adapter.dtype(target.path, name)))  # FP32 in between is exact
    return (value.T if target.path == EMBEDDING else value).contiguous()


def _part(adapter: Adapter, target: Target, kind: str) -> torch.Tensor:
    """A, or the rows of B or of the magnitude that belong to one matrix."""
    part = target.part
    assert part is not None
    low, high, magnitude = adapter.factors(target.path, part.expert or 0)
    if kind == A:
        return low
    value = high if kind == B else magnitude
    assert value is not None
    return torch.cat([value[first : first + count] for first, count in part.spans])


def _stacked(adapter: Adapter, path: str, linear: Linear, kind: str) -> torch.Tensor:
    """A (experts * rank, in) or B (out, rank * experts) of all routed experts, the expert as B's last axis."""
    factors = [adapter.factors(path, expert) for expert in range(linear.experts)]
    if kind == A:
        return torch.cat([low for low, _, _ in factors])
    return torch.stack([high for _, high, _ in factors], dim=-1).flatten(1)
