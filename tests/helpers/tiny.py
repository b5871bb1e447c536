"""Tiny random Hugging Face folders for tests: the real architecture and names, any widths, real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nano3.arch import Arch
from nano3.hf_config import ExpertSizes

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEM*E",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 4,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.05,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
DENSE: dict[str, Any] = {
    "hybrid_override_pattern": "M-MM*-M-",
    "hidden_size": 36,
    "num_attention_heads": 10,
    "mamba_head_dim": 10,
    **dict.fromkeys(ExpertSizes.__annotations__),
    **dict.fromkeys(("n_shared_experts", "norm_topk_prob")),
}
"""What makes the tiny model a dense one, with Nano-4B's oddities: five query heads a KV head, Mamba heads that are no
power of two, two Mamba layers side by side."""
MTP_CONFIG: dict[str, Any] = {
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "keep_mtp_spec_in_bf16": True,
}
"""What a config.json with a head of multi-token prediction has besides."""
TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def tiny_tensors(arch: Arch, dtypes: dict[str, str] | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of every name of `arch`. `dtypes`: name suffix -> BF16, F16 or F32, over the expected dtypes.

    A_log and D get their usual positive starting values, so that the model computes something sane.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in arch.tensors().items():
        value = torch.randn(spec.shape, generator=generator) * arch.initializer_range
        if name.endswith("A_log"):
            value = torch.log(torch.arange(1, spec.shape[0] + 1, dtype=torch.float32))
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            value = 1 + value
        dtype = next((word for suffix, word in (dtypes or {}).items() if name.endswith(suffix)), spec.dtype)
        tensors[name] = value.to(TORCH[dtype]).contiguous()
    return tensors


def mtp_tensors(arch: Arch, seed: int = 1) -> dict[str, torch.Tensor]:
    """A random head of multi-token prediction: an attention and an MoE layer, between the norms and the projection that
    join a hidden state with a token's embedding. Names as vLLM's nemotron_h_mtp.py loads them."""
    generator, hidden = torch.Generator().manual_seed(seed), arch.hidden_size
    attention, experts = arch.attention_layers[0], arch.moe_layers[0]
    shapes = {f"mtp.layers.0.{name}.weight": (hidden,) for name in ("enorm", "hnorm")}
    shapes |= {"mtp.layers.0.eh_proj.weight": (hidden, 2 * hidden), "mtp.layers.1.final_layernorm.weight": (hidden,)}
    for place, number in enumerate((attention, experts)):
        prefix = f"backbone.layers.{number}."
        layer = {name: spec.shape for name, spec in arch.tensors().items() if name.startswith(prefix)}
        shapes |= {name.replace(prefix, f"mtp.layers.{place}."): shape for name, shape in layer.items()}
    dtypes = {name: torch.float32 if name.endswith("bias") else torch.bfloat16 for name in shapes}
    return {name: torch.randn(shape, generator=generator).to(dtypes[name]) for name, shape in shapes.items()}


def tiny_hf_folder(
    path: Path, *, dtypes: dict[str, str] | None = None, shards: int = 1, seed: int = 0, **config_overrides: Any
) -> Path:
    """Writes a tiny random Hugging Face folder (with a tokenizer) and returns its path.

    `config_overrides` replace fields of config.json, None removes one; `dtypes` replace those of tensors by name
    suffix; `shards` is the number of safetensors files.
    """
    path.mkdir(parents=True)
    config = {name: value for name, value in (TINY_CONFIG | config_overrides).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    arch = Arch.from_config(config)
    tensors = tiny_tensors(arch, dtypes, seed) | (mtp_tensors(arch) if arch.num_nextn_predict_layers else {})
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    else:
        _save_shards(path, tensors, shards)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    _write_tokenizer(path, config["vocab_size"])
    return path


def _save_shards(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of single characters, as Hugging Face files."""
    special = ["<unk>", "<s>", "</s>"]
    words = special + [chr(code) for code in range(32, 32 + vocab_size - len(special))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": w,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, w in enumerate(special)
        ],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **names})
    )
