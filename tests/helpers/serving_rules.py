"""vLLM's and SGLang's own decisions about a quantized model, by their own code (tests/helpers/foreign.py).

Each answers as conversion/fp8/readers.py does: True for a module that it takes as excluded, None where it raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any
from unittest.mock import MagicMock

from tests.helpers.foreign import take


class Linear:
    """Stands in for their classes of linear layers: of a layer they ask for the class only."""


class Head(Linear):
    """For lm_head's."""


class Experts:
    """For routed experts'."""

    moe_config = None


class Cache:
    """For attention's."""


class Unquantized:
    """For the method of a layer that stays as it is."""


class Quantized:
    """For the methods of FP8 layers."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


def decisions(method: Callable[[Any, str], Any], modules: list[str]) -> dict[str, bool | None]:
    """A configuration's `get_quant_method` for every module."""
    result: dict[str, bool | None] = {}
    for module in modules:
        layer = Head() if module == "lm_head" else Experts() if module.endswith(".experts") else Linear()
        try:
            result[module] = not isinstance(method(layer, module), Quantized)
        except (ValueError, re.error):
            result[module] = None
    return result


COMMON = {"dataclass": dataclass, "field": field, "re": re, "logger": MagicMock()}


@cache
def vllm() -> dict[str, Any]:
    """vLLM's classes: the configuration, the model's names, the names of KV scales."""
    mapper = take("vllm/model_executor/models/utils.py", {"WeightsMapper": ()}, replace=replace, **COMMON)
    weights = {"WeightsMapper": mapper["WeightsMapper"]}
    quantization = "vllm/model_executor/layers/quantization"
    skipped = take(f"{quantization}/utils/quant_utils.py", {"is_layer_skipped": ()}, MappingProxyType=MappingProxyType)
    wanted = ("is_layer_excluded", "get_quant_method", "apply_vllm_mapper", "from_config")
    config = take(
        f"{quantization}/modelopt.py",
        {"ModelOptQuantConfigBase": wanted},
        is_layer_skipped=skipped["is_layer_skipped"],
        fnmatch=fnmatch,
        Attention=Cache,
        MLAAttention=Cache,
        LinearBase=Linear,
        ParallelLMHead=Head,
        RoutedExperts=Experts,
        UnquantizedLinearMethod=Unquantized,
        build_linear_method=Quantized,
        QUANT_ALGOS=["FP8"],
    )
    base = take(f"{quantization}/base_config.py", {"QuantizationConfig": ("get_cache_scale_mapper",)}, re=re, **weights)
    model = {"NemotronHForCausalLM": ("hf_to_vllm_mapper", "packed_modules_mapping")}
    return {
        **take("vllm/model_executor/models/nemotron_h.py", model, **weights),
        "ModelOptQuantConfigBase": config["ModelOptQuantConfigBase"],
        "scales": base["QuantizationConfig"].get_cache_scale_mapper(),
    }


def vllm_decisions(quantization: dict[str, Any], modules: list[str]) -> dict[str, bool | None]:
    """What vLLM makes of config.json's quantization_config."""
    found = vllm()
    model = found["NemotronHForCausalLM"]

    class Config(found["ModelOptQuantConfigBase"]):  # type: ignore[misc]
        quant_method, KVCacheMethodCls, FusedMoEMethodCls = "FP8", Quantized, Quantized
        packed_modules_mapping = model.packed_modules_mapping

        @classmethod
        def _from_config(cls, *, exclude_modules: list[str], **_: Any) -> Any:
            config = cls()
            config.exclude_modules = exclude_modules
            return config

    config = Config.from_config(quantization)
    config.apply_vllm_mapper(model.hf_to_vllm_mapper.get_rename_mapper())
    return decisions(config.get_quant_method, modules)


def vllm_scale(name: str) -> str | None:
    """What vLLM calls a KV scale of the checkpoint, by its model's names and the cache's, joined as its loader does."""
    found = vllm()
    return (found["NemotronHForCausalLM"].hf_to_vllm_mapper | found["scales"]).map_name(name)


@cache
def sglang() -> dict[str, Any]:
    """SGLang's classes, as `vllm` gives vLLM's."""
    mapper = take("sglang/srt/models/utils.py", {"WeightsMapper": ()}, **COMMON)
    quantization = "sglang/srt/layers/quantization"
    paths = {"is_layer_skipped": (), "_module_path_match": (), "_FALLBACK_FUSED_SHARDS": ()}
    utils = take(f"{quantization}/utils.py", paths, MappingProxyType=MappingProxyType)
    config = take(
        f"{quantization}/modelopt_quant.py",
        {
            "_compile_exclusion_pattern": (),
            "ModelOptQuantConfig": (
                "__init__",
                "_get_quant_method",
                "apply_weight_name_mapper",
                "is_layer_excluded",
            ),
            "ModelOptFp8Config": ("__init__", "from_config", "get_quant_method"),
        },
        re=re,
        lru_cache=lru_cache,
        QuantizationConfig=object,
        is_layer_skipped=utils["is_layer_skipped"],
        LinearBase=Linear,
        ParallelLMHead=Head,
        FusedMoE=Experts,
        RadixAttention=Cache,
        UnquantizedLinearMethod=Unquantized,
        ModelOptFp8LinearMethod=Quantized,
        ModelOptFp8MoEMethod=Quantized,
        ModelOptFp8KVCacheMethod=Quantized,
        logger=MagicMock(),
    )
    wanted = {"replace_prefix": (), "replace_substrings": (), "maybe_remap_kv_scale_name": ()}
    loading = take("sglang/srt/model_loader/weight_utils.py", wanted, print_warning_once=MagicMock())
    names = ("hf_to_sglang_mapper", "packed_modules_mapping", "remap_prefix", "remap_substr")
    model = take(
        "sglang/srt/models/nemotron_h.py", {"NemotronHForCausalLM": names}, WeightsMapper=mapper["WeightsMapper"]
    )
    return {**config, **loading, **model}


def sglang_decisions(quantization: dict[str, Any], modules: list[str]) -> dict[str, bool | None]:
    """What SGLang makes of config.json's quantization_config."""
    found = sglang()
    model = found["NemotronHForCausalLM"]
    packed = {"packed_modules_mapping": model.packed_modules_mapping}
    config = found["ModelOptFp8Config"].from_config(quantization | packed)
    config.apply_weight_name_mapper(model.hf_to_sglang_mapper)
    return decisions(config.get_quant_method, modules)


def sglang_scale(name: str, parameters: dict[str, Any]) -> str | None:
    """What SGLang calls a KV scale of the checkpoint, in the order of its loader."""
    found = sglang()
    model = found["NemotronHForCausalLM"]
    name = found["replace_substrings"](found["replace_prefix"](name, model.remap_prefix), model.remap_substr)
    return name if name in parameters else found["maybe_remap_kv_scale_name"](name, parameters)
