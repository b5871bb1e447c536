"""How those who load a quantized checkpoint decide which modules of it are FP8. Torch-free.

Nothing in the files says it; every reader derives it from the list of excluded modules, and each by rules of its own. A
module that is BF16 on disk and FP8 to the reader, or the reverse, is loaded without an error and answers nonsense.

Rules of vLLM 0.32 (vllm/model_executor/layers/quantization/modelopt.py, utils/quant_utils.py, models/nemotron_h.py) and
of SGLang 0.5.23 (sglang/srt/layers/quantization/modelopt_quant.py, utils.py, models/nemotron_h.py):
tests/conversion/test_readers.py compares them with those sources. Those of TensorRT-LLM as read in its sources
(tensorrt_llm/models/modeling_utils.py, _torch/models/modeling_nemotron_h.py), main branch of November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from functools import cache

from conversion.fp8.selection import matrices
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.patterns import Pattern

_FUSED = ("q_proj", "k_proj", "v_proj")
"""Attention's projections are one module, qkv_proj, in all three."""


def loaded_modules(arch: Arch) -> dict[str, list[str]]:
    """Modules that take a quantization method, named as the readers do -> the checkpoint's modules in each.

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


def vllm_excludes(module: str, excluded: Iterable[str]) -> bool | None:
    """vLLM: exact names, then names that occur anywhere in the module's, then patterns.

    One expert excluded by name excludes all of its layer. `X*` from ModelOpt is read as X and X.*, and layers 20 to 29
    are matched by layer 2's X all the same. None: q, k or v without the others, which vLLM refuses to load.
    """
    names: list[str] = []
    for name in excluded:
        split = len(name) >= 2 and name.endswith("*") and name[-2] != "."
        names += [name[:-1], f"{name[:-1]}.*"] if split else [name]
    names = [_vllm_name(name) for name in names]
    if module.endswith(".qkv_proj") and module not in names:
        shards = {shard in names for shard in _shards(module)}
        if len(shards) > 1:
            return None
        named = True in shards
    elif "experts" in module:
        named = any(module in name for name in names)
    else:
        named = module in names
    return named or any(name in module or fnmatch(module, name) for name in names)


def _vllm_name(name: str) -> str:
    name = name.replace("A_log", "A", 1).replace("embeddings", "embed_tokens", 1)
    return re.sub("^backbone", "model", name)


def sglang_excludes(module: str, excluded: Iterable[str]) -> bool | None:
    """SGLang: whole parts of the module's path, then patterns over the path or one part of it, in which `*` is `.*`.

    Experts are asked by patterns only, so their names one by one exclude nothing. None: q, k or v without the others,
    or a pattern that is no regular expression, which SGLang refuses to load.
    """
    names = [re.sub(r"^backbone\.", "model.", name) for name in excluded]
    skipped = False
    if module.endswith(".qkv_proj"):
        shards = {any(_holds(shard, name) for name in names) for shard in _shards(module)}
        if len(shards) > 1:
            return None
        skipped = True in shards
    elif not module.endswith(".experts"):
        skipped = any(_holds(module, name) for name in names)
        if ".shared_experts." in module:
            skipped = skipped or any(module in name for name in names)
    try:
        return skipped or any(_sglang_matches(module, name) for name in names)
    except UserError:
        return None


def _holds(module: str, name: str) -> bool:
    """Whether `name` is a run of whole parts of a module's path."""
    return f".{name.rstrip('.')}." in f".{module}."


def _sglang_matches(module: str, name: str) -> bool:
    candidates = [module, *module.split(".")]
    if re.fullmatch(r"[\w.]*", name):
        return name in candidates
    pattern = _expression(name.replace(".", r"\.").replace("*", ".*"))
    return any(pattern.matches(candidate) for candidate in candidates)


def _shards(module: str) -> list[str]:
    return [module.replace("qkv_proj", shard) for shard in _FUSED]


def tensorrt_excludes(module: str, excluded: Iterable[str]) -> bool | None:
    """TensorRT-LLM: the module or one that it is inside of matches a pattern; `re:` marks regular expressions.

    Releases before mid-2026 asked for the module only; with exact names the two agree.
    """
    names = [re.sub(r"(model\.layers\.)?backbone", "model", name) for name in excluded]
    parts = module.split(".")
    for shard in _shards(module) if parts[-1] == "qkv_proj" else [module]:
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
    """Where vLLM puts a KV scale of the checkpoint, or None where it has no place for it and drops it."""
    return _cache_scale(name, r"[kv]_proj\.[kv]_scale")


def sglang_cache_scale(name: str) -> str | None:
    """The same of SGLang."""
    return _cache_scale(name, r"k_proj\.k_scale|v_proj\.v_scale")


def _cache_scale(name: str, by_projection: str) -> str | None:
    match = re.fullmatch(
        rf"(?:backbone|model)\.layers\.(\d+)\.mixer\.(?:{by_projection}|(?:attn\.)?[kv]_scale|kv_scale)", name
    )
    if match is None:
        return None
    which = "k" if name.endswith("kv_scale") else name[-7]
    return f"model.layers.{match[1]}.mixer.attn.{which}_scale"


@dataclass(frozen=True)
class Reader:
    """One reader: what it takes as excluded from quantization, and where it puts KV scales.

    `keys` of config.json's quantization_config may hold its list of excluded modules; without any it is
    hf_quant_config.json's. `excludes` is None where the reader refuses to load.
    """

    name: str
    keys: tuple[str, ...]
    excludes: Callable[[str, Iterable[str]], bool | None]
    cache_scale: Callable[[str], str | None] | None = None

    def cache_problems(self, layers: Iterable[int], scales: Iterable[str]) -> Iterator[str]:
        """What this reader makes of attention layers whose KV scales it does not find all, by the names on disk."""
        if self.cache_scale is None:
            return
        filled = {self.cache_scale(name) for name in scales}
        both = {self.cache_scale(name) for name in scales if name.endswith(".kv_scale")}
        for number in layers:
            key, value = (f"model.layers.{number}.mixer.attn.{which}_scale" for which in "kv")
            if key not in filled and value not in filled:
                yield f"layer {number} has no KV scale where it looks: 1.0 would be used"
            elif key not in filled:
                yield f"layer {number} has a scale for values and none for keys, which it refuses to load"
            elif value not in filled and key not in both:
                yield f"layer {number} has no scale for values: that of the keys would be used"


READERS = (
    Reader("vLLM", ("ignore", "exclude_modules"), vllm_excludes, vllm_cache_scale),  # exclude_modules from 0.33 on
    Reader("SGLang", ("ignore",), sglang_excludes, sglang_cache_scale),
    Reader("TensorRT-LLM", (), tensorrt_excludes),
)
