"""`pico` as a transformers model that trains fast on one CPU core, and its export in the real checkpoint's layout.

Shapes: b sequences, l positions (s as a source position), g groups, h heads, p head width, n state width.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, NemotronHConfig

from nano3.arch import PRESETS
from nano3.hf_config import read_config
from pico.tokenizer import vocabulary

# Everything that is not here is as in the real config.json. At least 4 Mamba groups and heads divisible by 4 let
# TP=4 be tried; widths are multiples of 8, which transformers' grouped matrix product wants on a CPU.
PICO_FIELDS: dict[str, Any] = {
    "hybrid_override_pattern": "MEM*EME*E",
    "num_hidden_layers": 9,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 4,
    "chunk_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 192,
    "intermediate_size": 96,
    # The real 0.02 is for a width of 2688; at 128 it starves the residual stream and learning starts late.
    "initializer_range": 0.05,
    "max_position_embeddings": 4096,
}

FLOAT32_NAMES = ("A_log", "D", "e_score_correction_bias")
"""Families that stay FP32 in a BF16 checkpoint, as in the real one."""


def pico_config() -> dict[str, Any]:
    """config.json of pico: the real model's fields with `PICO_FIELDS` and the vocabulary size put in."""
    real = read_config(PRESETS["nano"])
    return {**real, **PICO_FIELDS, "vocab_size": len(vocabulary())}


def build_model() -> nn.Module:
    """A freshly initialized FP32 pico whose Mamba mixers run `mamba_forward`."""
    model = AutoModelForCausalLM.from_config(NemotronHConfig(**pico_config()), dtype=torch.float32)
    for mixer in mamba_mixers(model):
        mixer.forward = MethodType(mamba_forward, mixer)
    return model


def mamba_mixers(model: nn.Module) -> list[Any]:
    """The Mamba-2 mixers, in layer order."""
    return [module for module in model.modules() if hasattr(module, "A_log")]


def routers(model: nn.Module) -> list[Any]:
    """The MoE routers, in layer order."""
    return [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]


def mamba_forward(mixer: Any, hidden_states: Tensor, **_: Any) -> Tensor:
    """transformers' Mamba-2 mixer for training on short sequences: no cache, no padding mask, no dt floor.

    The whole sequence is one chunk, so the state recurrence disappears and the scan is a masked (l, s) product; the
    convolution is a sum of shifted products, which beats a grouped `conv1d` on a CPU. Right padding is harmless since
    everything is causal. Shape in and out: (b, l, hidden).
    """
    b, length = hidden_states.shape[:2]
    g, h, p, n = mixer.n_groups, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    gate, xbc, dt = mixer.in_proj(hidden_states).split([h * p, mixer.conv_dim, h], dim=-1)
    kernel = mixer.conv1d.weight[:, 0]
    padded = F.pad(xbc, (0, 0, kernel.shape[1] - 1, 0))
    xbc = F.silu(sum((padded[:, k : k + length] * kernel[:, k] for k in range(kernel.shape[1])), mixer.conv1d.bias))
    x, b_in, c_out = xbc.split([h * p, g * n, g * n], dim=-1)
    x = x.view(b, length, h, p).transpose(1, 2)
    b_in = b_in.view(b, length, g, n).transpose(1, 2)
    c_out = c_out.view(b, length, g, n).transpose(1, 2)
    dt = F.softplus(dt + mixer.dt_bias).transpose(1, 2)
    decay = (dt * -torch.exp(mixer.A_log)[:, None]).cumsum(-1)
    future = torch.full((length, length), -torch.inf).triu(1)
    weights = torch.exp(decay[..., :, None] - decay[..., None, :] + future).view(b, g, h // g, length, length)
    weights = (weights * (c_out @ b_in.transpose(-1, -2))[:, :, None]).view(b, h, length, length)
    y = weights @ (x * dt[..., None]) + x * mixer.D[:, None, None]
    return mixer.out_proj(mixer.norm(y.transpose(1, 2).reshape(b, length, h * p), gate))


def checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors with the names, shapes and dtypes of the real checkpoint: experts one by one, BF16 but for
    `FLOAT32_NAMES`."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        dtype = torch.float32 if name.rsplit(".", 1)[-1] in FLOAT32_NAMES else torch.bfloat16
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        value = value.to(dtype)
        if ".experts." in name:
            prefix, projection = name.rsplit(".", 1)
            for expert, weight in enumerate(value):
                tensors[f"{prefix}.{expert}.{projection}.weight"] = weight.clone()
        else:
            tensors[name] = value.clone()
    return tensors


def export(model: nn.Module, folder: Path) -> None:
    """Writes model.safetensors and config.json into `folder`."""
    save_file(checkpoint_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(pico_config(), indent=2) + "\n")
