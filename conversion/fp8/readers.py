"""How those who load a quantized checkpoint decide which modules of it are FP8. Torch-free.

Nothing in the files says it; every reader derives it from the list of excluded modules, and each by rules of its own. A
module that is BF16 on disk and FP8 to the reader, or the reverse, is loaded without an error and answers nonsense.
Rules as read in the sources of vLLM (vllm/model_executor/layers/quantization/modelopt.py, models/nemotron_h.py,
model_loader/weight_utils.py) and TensorRT-LLM (tensorrt_llm/models/modeling_utils.py,
_torch/models/modeling_nemotron_h.py), main branches of November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from functools import cache

from conversion.fp8.selection import matrices
from nano3.arch import Arch
from nano3.patterns import Pattern

_FUSED = ("q_proj", "k_proj", "v_proj")
"""Attention's projections are one module, qkv_proj, in both."""


def loaded_modules(arch: Arch) -> dict[str, list[str]]:
    """Modules that take a quantization method, named as both readers do -> the checkpoint's modules in each.

    Routed experts of a layer are one module; so are q, k and v. lm_head counts, embeddings do not (no linear layer).
    """
    result: dict[str, list[str]] = {}
    for name in matrices(arch):
        parent, _, last = name.replace("backbone.", "model.", 1).rpartition(".")
        if ".experts." in name:
            module = parent.rpartition(".")[0]
        else:
            module = f"{parent}.{'qkv_proj' if last in _FUSED else last}"
        result.setdefault(module, []).append(name)
    return result | {"lm_head": ["lm_head"]}


def vllm_excludes(module: str, excluded: Iterable[str]) -> bool:
    """vLLM: exact names (all shards of a fused module), then names that occur anywhere in the module's, then patterns.

    `X*` from ModelOpt is read as X and X.*, and layers 20 to 29 are matched by layer 2's X all the same.
    """
    names: list[str] = []
    for name in excluded:
        split = len(name) >= 2 and name.endswith("*") and name[-2] != "."
        names += [name[:-1], f"{name[:-1]}.*"] if split else [name]
    names = [_vllm_name(name) for name in names]
    return module in names or any(name in module or fnmatch(module, name) for name in names)


def _vllm_name(name: str) -> str:
    name = re.sub("^backbone", "model", name).replace("embeddings", "embed_tokens")
    return re.sub(r"\.[qkv]_proj", ".qkv_proj", name)


def tensorrt_excludes(module: str, excluded: Iterable[str]) -> bool:
    """TensorRT-LLM: the module or one that it is inside of matches a pattern; `re:` marks regular expressions.

    Releases before mid-2026 asked for the module only; with exact names the two agree.
    """
    names = [re.sub(r"(model\.layers\.)?backbone", "model", name) for name in excluded]
    parts = module.split(".")
    shards = [module.replace("qkv_proj", shard) for shard in _FUSED] if parts[-1] == "qkv_proj" else [module]
    for shard in shards:
        lineage = [".".join(shard.split(".")[:depth]) for depth in range(len(parts), 0, -1)]
        if not any(_matches(candidate, name) for candidate in lineage for name in names):
            return False
    return True


def _matches(candidate: str, name: str) -> bool:
    if name.startswith("re:"):
        return _expression(name[3:]).matches(candidate)
    if name.endswith(".*") and candidate == name[:-2]:
        return True
    return fnmatchcase(candidate, name)


@cache
def _expression(text: str) -> Pattern:
    return Pattern(text, "the excluded modules")


def vllm_cache_scale(name: str) -> str | None:
    """Where vLLM puts a KV scale of the checkpoint, or None where it would not be found and 1.0 stay in its place."""
    match = re.fullmatch(r"backbone\.layers\.(\d+)\.mixer\.(?:k_proj\.k|v_proj\.v)_scale", name)
    return f"model.layers.{match[1]}.mixer.attn.{name[-7]}_scale" if match else None


@dataclass(frozen=True)
class Reader:
    """One reader: its name, and whether it takes a module as excluded from quantization."""

    name: str
    excludes: Callable[[str, Iterable[str]], bool]


READERS = (Reader("vLLM", vllm_excludes), Reader("TensorRT-LLM", tensorrt_excludes))
