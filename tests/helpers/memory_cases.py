"""What tests/helpers/memory_probe.py builds and measures, and tests/launch/test_memory_plan.py predicts."""

from __future__ import annotations

from typing import Any

LAYOUTS = [
    "one", "ep8", "tp2.ep8", "tp4.ep4", "pp2.ep4", "pp4", "ep16", "tp2.etp2.ep2", "tp8.ep8", "tp2.pp2.ep2.cp2",
]  # fmt: skip
"""Of the real model, on the meta device; all ranks of a pipeline stage hold the same number of bytes."""
DENSE_LAYOUTS = ["one", "tp2.pp2"]
"""Of Nemotron-3-Nano-4B, likewise."""
NF4_LAYOUTS = ["ep8", "tp8.ep8", "tp2.etp2.ep2"]
"""Whose linear layers are frozen in NF4 too; tp8 and etp2 cut rows amid a block."""
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "peft": {"preset": "peft", "experts": "none", "rank_pattern": ["in_proj:64"]},
    "each": {"experts": "each"},
    "dora": {"dora": True},
    "each dora vocabulary": {"experts": "each", "dora": True, "vocabulary": True},
}
VARIANT_LAYOUTS = ["ep8", "tp2.ep4.pp2", "tp4.ep4", "tp2.etp2.ep2"]
TINY = {"rank": 4, "alpha": 8.0}
RUNS: dict[str, tuple[str, str, dict[str, Any] | None, tuple[str, ...]]] = {
    "one": ("one", "float32", {}, ()),
    "tp2": ("tp2", "float32", {}, ()),
    "pp2": ("pp2", "float32", {}, ()),
    "cp2": ("cp2", "float32", {}, ()),
    "ep2": ("ep2", "float32", {}, ()),
    "tp2.ep2 bf16": ("tp2.ep2", "bfloat16", {}, ()),
    "ep2 bf16": ("ep2", "bfloat16", {"experts": "each"}, ()),
    "dp2 bf16 all weights": ("dp2", "bfloat16", None, ()),
    "all weights": ("one", "float32", None, ()),
    "dora": ("one", "float32", {"dora": True}, ()),
    "dropout": ("one", "float32", {"dropout": 0.1}, ()),
    "attention": ("one", "float32", {"preset": "attention"}, ()),
    **{
        name: ("one", "float32", {}, (name,))
        for name in ("moe", "moe_act", "shared_experts", "layernorm", "mamba", "full")
    },
    "tp2 moe": ("tp2", "float32", {}, ("moe", "layernorm")),
    "chunked": ("one", "float32", {"loss_chunk": 20}, ()),
    "chunked tp2 bf16": ("tp2", "bfloat16", {"loss_chunk": 20}, ()),
    "dense tp2": ("tp2@M-MM*-M-", "float32", {}, ()),
    "nf4": ("one", "float32", {"nf4": True}, ()),
    "nf4 dora": ("one", "float32", {"nf4": True, "dora": True}, ()),
    "nf4 tp2": ("tp2", "float32", {"nf4": True}, ()),
    "nf4 ep2 bf16": ("ep2", "bfloat16", {"nf4": True, "experts": "each"}, ()),
    "nf4 full": ("one", "float32", {"nf4": True}, ("full",)),
}
"""On CPU ranks: layout with the layer pattern where it is another, dtype, adapters (None: every weight is trained; with
`nf4` on a base in 4 bits, which is wider; `loss_chunk`: positions whose logits exist at a time), recomputation."""
