"""Activations that the backward pass computes again instead of keeping.

`moe`, `moe_act`, `shared_experts` and `layernorm` are Megatron-Core's selective recomputation, which acts inside its
layers. Its full recomputation does not: `MambaStack` of 0.16.1 never looks at the setting. So `full` (every layer keeps
its input alone) and `mamba` (every Mamba layer does) wrap the layers here.

Not offered: `core_attn`, since a fused attention kernel keeps no scores, only its output and one number a row and head,
and the output stays anyway as the input of the next adapter; `mlp` and `mla_up_proj`, which this model does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import checkpoint
from torch import nn

SELECTIVE = ("moe", "moe_act", "shared_experts", "layernorm")
"""What Megatron-Core does itself, in its words."""


def recompute_kwargs(recompute: Sequence[str]) -> dict[str, Any]:
    """Fields of Megatron-Core's `TransformerConfig` for what it recomputes itself."""
    modules = [name for name in recompute if name in SELECTIVE]
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}


def install_recompute(model: MambaModel, recompute: Sequence[str]) -> None:
    """Does the rest: wraps layers for `full` and `mamba`, and lets the first of them have a gradient to pass on."""
    if recompute and model.pre_process:
        model.embedding.register_forward_hook(_require_gradient)
    for layer in model.decoder.layers:
        if "full" in recompute or ("mamba" in recompute and isinstance(layer, MambaLayer)):
            layer.forward = partial(_recomputed, layer, layer.forward)


def _require_gradient(module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A recomputed part has a backward pass only if its input has a gradient: with a frozen base the first has none,
    and its adapters would learn nothing."""
    if module.training and torch.is_grad_enabled() and not output.requires_grad:
        return output.detach().requires_grad_()
    return output


def _recomputed(layer: nn.Module, forward: Callable, hidden_states: torch.Tensor, **settings: Any) -> Any:
    """`forward` of a layer, which keeps only `hidden_states`. Random numbers are the same the second time."""
    run = partial(_with_input_first, forward, settings)
    if layer.training and torch.is_grad_enabled():
        return checkpoint(run, False, hidden_states)
    return run(hidden_states)


def _with_input_first(forward: Callable, settings: dict[str, Any], hidden_states: torch.Tensor) -> Any:
    return forward(hidden_states=hidden_states, **settings)
