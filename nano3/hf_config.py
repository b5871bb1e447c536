"""Reads a Hugging Face config.json of the Nemotron-H family. Imports neither torch nor NeMo.

Every field is used, or known not to change the network (`IGNORED`, with the reason), or held to the values we support
(`FIXED`); anything else is refused by name, so that a variant of the model is never read as the plain one.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, MaxLen
from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import Name, check, read_json, shown

FP8_ACTIVATIONS = "fp8_activations.json"
"""File beside dequantized weights with FP8's scales of activations and cache (nano3/fp8_emulation.py)."""

BLOCK_TYPES = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}
"""The words that transformers writes for the letters; `mamba` and `attention` are its older ones."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""torch's dtype names -> those of safetensors headers."""

DT_RANGE = (0.0, float("inf"))
"""Bounds of the Mamba time step dt: none, as in training (megatron-core does not clamp it).

transformers 5.15 and later clamp dt from below at the config's time_step_min, which only concerns initial values
(transformers pull request 48989), and only over whole prompts: its one-token step does not clamp. Whoever runs its code
sets `time_step_limit` of every module that has one to this.
"""

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("nemotron_h",),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "conv_kernel": (4,),  # megatron-core's mixer has no setting for it
    "hidden_dropout": (0,),
    "mamba_hidden_act": ("silu",),
    "mamba_proj_bias": (False,),
    "mlp_bias": (False,),
    "mlp_hidden_act": ("relu2",),
    "moe_latent_size": (None, 0),
    "n_group": (1,),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "quantization_config": (None,),
    "residual_in_fp32": (False,),
    "sliding_window": (None,),
    "tie_word_embeddings": (False,),
    "time_step_limit": (list(DT_RANGE),),
    "topk_group": (1,),
    "use_bias": (False,),
    "use_conv_bias": (True,),
}
"""Fields that change the network, and the values that we support. Absent means the first: transformers' default."""

_LACKS = {
    "moe_latent_size": "the experts of Nemotron-3-Super work in a narrower, latent space; the map of tensor names, the "
    "adapters of experts and the memory plan lack it",
}
"""Why a value is not supported, where a member of the family has it."""

_GENERATION = "concerns tokenizer and generation, not the network"
_LABEL = "a label"
_MTP = "heads of multi-token prediction are carried along, never run (num_nextn_predict_layers)"
_HF_INIT = "starting values of training from scratch in transformers; checkpoints bring their weights"
IGNORED = {
    "_name_or_path": _LABEL,
    "architectures": _LABEL,
    "auto_map": "names of the remote code, which we never run",
    "bos_token_id": _GENERATION,
    "eos_token_id": _GENERATION,
    "id2label": _LABEL,
    "label2id": _LABEL,
    "unsloth_fixed": _LABEL,
    "unsloth_version": _LABEL,
    "expand": "the width of the Mamba layers is mamba_num_heads * mamba_head_dim",
    "mamba_ssm_cache_dtype": "the cache of generation",
    "moe_shared_expert_overlap": "how kernels are scheduled",
    "keep_mtp_spec_in_bf16": _MTP,
    "mtp_hybrid_override_pattern": _MTP,
    "mtp_layers_block_type": _MTP,
    "num_logits_to_keep": _GENERATION,
    "output_router_logits": "what transformers returns",
    "pad_token_id": _GENERATION,
    "partial_rotary_factor": "the model has no rotary embedding",
    "rescale_prenorm_residual": _HF_INIT,
    "rope_theta": "the model has no rotary embedding",
    "time_step_floor": _HF_INIT,
    "time_step_max": _HF_INIT,
    "time_step_min": _HF_INIT + " (transformers from 5.15 also clamps dt by it; the model was not trained so)",
    "transformers_version": _LABEL,
    "use_cache": _GENERATION,
    "use_mamba_kernels": "which kernels transformers runs",
}
"""Fields that do not change the network, with the reason."""

MAX_LAYERS = 10_000
MAX_EXPERTS = 200_000
"""Most routed experts of all layers together: their tensors are named one by one (Nano has 2,944, a model of 120B
parameters 20,480)."""

_NOT_OURS = "this is no config.json of a Nemotron-H model; fetch it again"

ALIASES = {
    "attention_head_dim": "head_dim",  # Nemotron-H-8B
    "norm_eps": "layer_norm_epsilon",
    "num_query_groups": "num_key_value_heads",
    "rms_norm_eps": "layer_norm_epsilon",
}
"""Second names of a field; either will do, and both if they agree."""


def read_config(path: Path | str) -> dict[str, Any]:
    """The config.json at `path` (the file, or a folder with it) as a dict; `UserError` when it cannot be read."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise UserError(f"no config.json at {path}; give a Hugging Face model folder")
    return read_json(file, dict, "fetch it again")


PLAIN = ("qwen3",)
"""Values of model_type that are tuned here in plain transformers (recipes/qwen3_qlora.py): dense models whose modules
are called as their tensors are."""


def is_plain(folder: Path) -> bool:
    """Whether a folder holds a model of `PLAIN`."""
    return (folder / "config.json").is_file() and read_config(folder).get("model_type") in PLAIN


_Width = Annotated[int, Ge(1), Le(1 << 20)]
_Many = Annotated[int, Ge(1), Le(1 << 16)]


class Sizes(TypedDict):
    """The fields of a config.json that are numbers of the network, and their ranges.

    The largest of each is some hundred times that of any model of the family.
    """

    vocab_size: Annotated[int, Ge(1), Le(1 << 24)]
    hidden_size: _Width
    num_attention_heads: _Many
    num_key_value_heads: _Many
    head_dim: _Many
    mamba_num_heads: _Many
    mamba_head_dim: _Many
    ssm_state_size: _Many
    n_groups: _Many
    conv_kernel: _Many
    chunk_size: _Many
    intermediate_size: _Width
    max_position_embeddings: Annotated[int, Ge(1), Le(1 << 30)]
    layer_norm_epsilon: Annotated[float, Gt(0), Le(0.1)]
    initializer_range: Annotated[float, Ge(0), Le(100)]


class ExpertSizes(TypedDict):
    """The same for the mixture of experts. A dense model has none of them, or transformers' defaults, which say nothing
    about it: they count as 0."""

    n_routed_experts: _Many
    num_experts_per_tok: _Many
    moe_intermediate_size: _Width
    moe_shared_expert_intermediate_size: _Width
    routed_scaling_factor: Annotated[float, Gt(0), Le(1000)]


NUMBERS: dict[str, Any] = {**Sizes.__annotations__, **ExpertSizes.__annotations__}


class Layers(TypedDict, total=False):
    """The fields that say what the layers are."""

    hybrid_override_pattern: Annotated[str, MaxLen(MAX_LAYERS)] | None
    layers_block_type: Annotated[list[Name], MaxLen(MAX_LAYERS)] | None
    layer_types: Annotated[list[Name], MaxLen(MAX_LAYERS)] | None
    num_hidden_layers: _Many
    num_nextn_predict_layers: Annotated[int, Ge(0), Le(64)]
    dtype: Name
    torch_dtype: Name


def architecture_fields(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The `Sizes` and `ExpertSizes` of a config.json, plus `pattern`, `dtype` and `num_nextn_predict_layers`.

    Raises `UserError` naming the field when one is missing, unknown, malformed, or has a value that we do not support.
    `source` is how messages call the file.
    """
    config = {key: _plain(key, value, source) for key, value in config.items()}
    _refuse_unsupported(config, source)
    config = _without_aliases(config, source)
    check(config, Layers, source, _NOT_OURS)
    values: dict[str, Any] = {"pattern": _pattern(config, source), "dtype": _dtype(config, source)}
    values["num_nextn_predict_layers"] = config.get("num_nextn_predict_layers", 0)
    check(config, Sizes, source, _NOT_OURS)
    if "E" in values["pattern"]:
        check(config, ExpertSizes, source, _NOT_OURS)
    else:
        config |= dict.fromkeys(ExpertSizes.__annotations__, 0)
    for name, kind in NUMBERS.items():
        values[name] = float(config[name]) if "float" in str(kind) else config[name]
    _refuse_unknown(config, source)
    layers, experts = values["pattern"].count("E"), values["n_routed_experts"]
    if layers * experts > MAX_EXPERTS:
        raise UserError(
            f"{source}: n_routed_experts is {experts} in {layers} layers, more than {MAX_EXPERTS:,} in all; {_NOT_OURS}"
        )
    return values


_INFINITIES = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def _plain(name: str, value: Any, source: str) -> Any:
    """Undoes transformers' JSON form of infinities, {"__float__": "Infinity"}; tuples and lists become lists."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        if not isinstance(value["__float__"], str) or value["__float__"] not in _INFINITIES:
            raise UserError(f"{source}: {name} is {shown(value)}; __float__ must be one of {', '.join(_INFINITIES)}")
        return _INFINITIES[value["__float__"]]
    if isinstance(value, list | tuple):
        return [_plain(name, item, source) for item in value]
    return value


def _refuse_unsupported(config: dict[str, Any], source: str) -> None:
    if "model_type" not in config:
        raise UserError(f"{source}: no model_type; not the config.json of a Hugging Face model")
    for name, supported in FIXED.items():
        if name == "quantization_config" and config.get(name) is not None:
            raise UserError(f"{source}: this checkpoint is quantized (quantization_config); give the BF16 one")
        value = config.get(name, supported[0])
        if not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in supported):
            allowed = " or ".join(json.dumps(good) for good in supported)
            lacks = f": {_LACKS[name]}" if name in _LACKS else ""
            raise UserError(f"{source}: {name} is {_short(value)}; this project supports only {allowed}{lacks}")


def _without_aliases(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Every field under its first name. Raises `UserError` where the two disagree."""
    result = {name: value for name, value in config.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if config.get(alias) is not None and result.setdefault(name, config[alias]) != config[alias]:
            raise UserError(
                f"{source}: {alias} {shown(config[alias])} and {name} {shown(result[name])} disagree; remove one"
            )
    return result


def _refuse_unknown(config: dict[str, Any], source: str) -> None:
    known = sorted({*NUMBERS, *Layers.__annotations__, *FIXED, *IGNORED, *ALIASES})
    for name, value in config.items():
        if name not in known and value is not None:  # null is what transformers writes for: not given
            near = get_close_matches(name, known, 1)
            hint = f" (nearest known field: {near[0]})" if near else ""
            raise UserError(f"{source}: unknown field {name!r}{hint}; we cannot tell whether it changes the network")


def _pattern(config: dict[str, Any], source: str) -> str:
    """The layer letters, from whichever of the three fields is there; all must agree, as must num_hidden_layers."""
    found: dict[str, str] = {}
    if config.get("hybrid_override_pattern") is not None:
        found["hybrid_override_pattern"] = config["hybrid_override_pattern"]
    for name in ("layers_block_type", "layer_types"):
        words = config.get(name)
        if words is not None:
            unknown = sorted(set(words) - set(BLOCK_TYPES))
            if unknown:
                raise UserError(f"{source}: {name} has unknown layer types {unknown}; known are {list(BLOCK_TYPES)}")
            found[name] = "".join(BLOCK_TYPES[word] for word in words)
    if not found:
        raise UserError(f"{source}: no hybrid_override_pattern and no layers_block_type; not a Nemotron-H config")
    if len(set(found.values())) > 1:
        raise UserError(f"{source}: the layer patterns disagree: {found}; remove one")
    pattern = next(iter(found.values()))
    count = config.get("num_hidden_layers", len(pattern))
    if count != len(pattern):
        raise UserError(f"{source}: num_hidden_layers is {count} but the layer pattern {pattern} has {len(pattern)}")
    return pattern


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else shown(value)


def _dtype(config: dict[str, Any], source: str) -> str:
    name = config.get("dtype", config.get("torch_dtype", "bfloat16"))
    if name not in DTYPES:
        raise UserError(f"{source}: dtype is {json.dumps(name)}; known are {', '.join(DTYPES)}")
    return DTYPES[name]
