"""Every kind of adapter, for tests/nano3/test_variants.py and its worker. Imports neither torch nor NeMo."""

from __future__ import annotations

from typing import Any

from finetune.settings import LoraSettings

VOCABULARY = ["linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2"]
VOCABULARY += ["word_embeddings", "output_layer"]
PATTERNS = {"rank_pattern": ["in_proj:6", "*.experts.*:2", "*.shared_experts.*:8"], "alpha_pattern": ["*.linear_*:3"]}

EVERYTHING = {
    "each": LoraSettings(targets=VOCABULARY, experts="each", dora=True, rslora=True, plus_ratio=4.0, **PATTERNS),
    "shared": LoraSettings(targets=VOCABULARY, dora=True),
}
"""All settings at once: the fast tier."""

ONE_BY_ONE = {
    "plain": LoraSettings(),
    "plain each": LoraSettings(experts="each"),
    "no experts": LoraSettings(experts="none"),
    "attention": LoraSettings(preset="attention"),
    "peft": LoraSettings(preset="peft"),
    "patterns": LoraSettings(**PATTERNS),
    "rslora": LoraSettings(rslora=True),
    "plus": LoraSettings(plus_ratio=16.0),
    "dora": LoraSettings(dora=True),
    "dora each": LoraSettings(dora=True, experts="each"),
    "vocabulary": LoraSettings(targets=["word_embeddings", "output_layer"]),
    "vocabulary dora": LoraSettings(targets=["word_embeddings", "output_layer"], dora=True),
}
VARIANTS = EVERYTHING | ONE_BY_ONE
for _settings in VARIANTS.values():
    _settings.rank, _settings.alpha = 4, 8.0

LAYOUTS = {"ep2": (1, 2), "tp2": (2, 1), "tp2ep2": (2, 2)}
"""Tensor and expert parallel size, on two ranks."""

FAULTS = {
    "mixed experts": ("each", "ep2"),
    "length of a slice": ("shared", "tp2"),
    "norm of one rank": ("each", "tp2ep2"),
    "decayed lengths": ("shared", "ep2"),
}
"""A deliberate fault -> the variant and the layout in which it must show."""


def facts(settings: LoraSettings, base_config: dict[str, Any]) -> dict[str, Any]:
    """What `lora.json` says of an adapter with these settings."""
    names = ("rank", "alpha", "rank_pattern", "alpha_pattern", "rslora", "dora", "experts")
    chosen = {name: getattr(settings, name) for name in names}
    return {"format": 2, **chosen, "targets": settings.chosen_targets(), "base_config": base_config}
