"""Layers whose calibration is measured: name -> (pattern, tokens of a sample, sizes over the tiny model's)."""

from __future__ import annotations

_MOE = {"hidden_size": 512, "num_experts_per_tok": 4, "moe_shared_expert_intermediate_size": 512}
_WIDE = _MOE | {"moe_intermediate_size": 256, "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 1024}
_MAMBA = {"hidden_size": 256, "mamba_num_heads": 16, "mamba_head_dim": 32, "ssm_state_size": 64, "chunk_size": 64}

CASES: dict[str, tuple[str, int, dict[str, int]]] = {
    "experts": ("E", 64, _MOE | {"moe_intermediate_size": 512, "n_routed_experts": 96}),
    "twice the experts": ("E", 64, _MOE | {"moe_intermediate_size": 512, "n_routed_experts": 192}),
    "tokens through experts": ("E", 8192, _WIDE),
    "tokens through Mamba": ("M", 2048, _MAMBA),
    "a larger state": ("M", 2048, _MAMBA | {"ssm_state_size": 128}),
    "more heads": ("M", 2048, _MAMBA | {"mamba_num_heads": 32}),
}
