"""Which matrices of the model become FP8, and what a checkpoint with them says about itself. Torch-free.

The published recipe (technical report of the model, arXiv 2512.20848, section 4) keeps the attention layers and the
Mamba layers that feed them in BF16, and with them every convolution, router, norm, the embeddings and lm_head; all
other matrices and the KV cache are FP8 E4M3 with static scales, one per tensor. Which layers those are follows from
the pattern.

On disk, as NVIDIA ModelOpt's unified checkpoints have it: `X.weight` holds the codes, `X.weight_scale` and
`X.input_scale` are FP32 scalars, and attention has `k_proj.k_scale` and `v_proj.v_scale` for the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from annotated_types import MaxLen
from typing_extensions import TypedDict

from conversion.checkpoint.safetensors_layout import FP8, ITEM_BYTES, TensorTable
from nano3.arch import MTP, Arch
from nano3.cli import UserError
from nano3.documents import Name, read_yaml

E4M3_MAX = 448.0
"""Largest finite value of FP8 E4M3 (OCP 8-bit floating point specification): amax / 448 is a tensor's scale."""

MATRIX_FAMILIES = ("mamba", "attention", "routed_experts", "shared_experts", "mlp")
SCALES = ("weight_scale", "input_scale")
KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")


def matrices(arch: Arch) -> dict[str, str]:
    """Every matrix that a kernel could run in FP8: module name -> family. Router, embeddings, lm_head are none."""
    return {
        name.removesuffix(".weight"): spec.family
        for name, spec in arch.tensors().items()
        if spec.family in MATRIX_FAMILIES and name.endswith("_proj.weight")
    }


def scale_problem(dtype: str, shape: tuple[int, ...], value: float) -> str | None:
    """What is wrong with a scale, in words; None for one positive finite FP32 value. `value` is its first."""
    if dtype != "F32" or shape not in ((), (1,)):
        return f"is {dtype} {shape}, not one F32 value"
    return None if 0 < value < float("inf") else f"is {value}, not a positive number"


def layer_of(name: str) -> int:
    """Number of the layer that a module or tensor named `backbone.layers.N...` is in."""
    return int(name.split(".")[2])


def require_experts(arch: Arch, source: str) -> None:
    """Raises `UserError` for a dense model; `source` is how the message calls it."""
    if not arch.moe_layers:
        raise UserError(
            f"{source} is a dense member of the family: the published FP8 recipe is of the model with experts, and no "
            "selection of a dense one was ever compared with its BF16 model; serve that"
        )


_Names = Annotated[list[Name], MaxLen(100_000)]


class SelectionFile(TypedDict, total=False):
    """A selection in YAML."""

    quantize: _Names | None
    keep: _Names | None
    kv_cache: bool


@dataclass(frozen=True)
class Selection:
    """What becomes FP8: the modules `chosen`, and the KV cache or not."""

    arch: Arch
    chosen: frozenset[str]
    kv_cache: bool = True

    @classmethod
    def published(cls, arch: Arch) -> Selection:
        """The published recipe: all matrices but those of attention and of the Mamba layers that feed it."""
        kept = {*arch.attention_layers, *arch.feeding_mamba_layers}
        return cls(arch, frozenset(name for name in matrices(arch) if layer_of(name) not in kept))

    @classmethod
    def from_yaml(cls, arch: Arch, path: Path) -> Selection:
        """A selection of one's own: `quantize` and `keep`, lists of patterns over module names, and `kv_cache`.

        A module becomes FP8 when a pattern of `quantize` matches it and none of `keep`. Raises `UserError` for other
        keys, a pattern that matches nothing, and an empty selection.
        """
        told = read_yaml(path, SelectionFile, "it must be a mapping with quantize, keep and kv_cache")
        if not set(told) <= set(SelectionFile.__annotations__):
            raise UserError(f"{path} must be a mapping with quantize, keep (lists of patterns) and kv_cache only")
        known = list(matrices(arch))
        given = {"quantize": told.get("quantize"), "keep": told.get("keep")}
        matched = {key: _match(patterns or [], known, f"{path}: {key}") for key, patterns in given.items()}
        chosen = frozenset(matched["quantize"] - matched["keep"])
        if not chosen:
            raise UserError(f"{path} leaves nothing to quantize; quantize: ['*'] takes every matrix")
        return cls(arch, chosen, told.get("kv_cache", True))

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Attention layers whose cache has scales."""
        return self.arch.attention_layers if self.kv_cache else ()

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """Names of all scales that a checkpoint with this selection has."""
        names = [f"{module}.{scale}" for module in matrices(self.arch) if module in self.chosen for scale in SCALES]
        return (*names, *(f"backbone.layers.{n}.mixer.{scale}" for n in self.kv_layers for scale in KV_SCALES))

    def table(
        self, dtypes: dict[str, str], carried: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    ) -> TensorTable:
        """Name -> (dtype, shape) of every tensor of the quantized checkpoint; `dtypes` are those of the source, and
        `carried` the shapes of its tensors that are no part of the model."""
        result: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, spec in self.arch.tensors().items():
            module = name.removesuffix(".weight")
            result[name] = (FP8 if module in self.chosen else dtypes[name], spec.shape)
        result |= {name: (dtypes[name], shape) for name, shape in carried.items()}
        return result | dict.fromkeys(self.scalars, ("F32", ()))

    @cached_property
    def excluded(self) -> list[str]:
        """Modules that readers must load as they are, by their exact names; those of multi-token prediction as one.

        Exact, because `backbone.layers.2*`, which ModelOpt writes for a whole layer, is layers 20 to 29 as well to the
        readers (conversion/fp8/readers.py). Of a layer whose routed experts are all kept there is `mixer.experts` too:
        SGLang and TensorRT-LLM ask for that name.
        """
        names = ["lm_head", "backbone.embeddings", *([f"{MTP}*"] if self.arch.num_nextn_predict_layers else [])]
        experts = {name.rpartition(".experts.")[0] for name in matrices(self.arch) if ".experts." in name}
        quantized = {name.rpartition(".experts.")[0] for name in self.chosen if ".experts." in name}
        names += [f"{mixer}.experts" for mixer in experts - quantized]
        for name in self.arch.tensors():
            module = name.removesuffix(".weight")
            is_linear = name.endswith((".conv1d.weight", ".gate.weight", "_proj.weight"))
            if is_linear and module not in self.chosen:
                names.append(module)
        return sorted(names)

    def hf_quant_config(self, version: str) -> dict[str, Any]:
        """Content of hf_quant_config.json; `version` of ModelOpt whose format and calibration this is."""
        return {
            "producer": {"name": "modelopt", "version": version},
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8" if self.kv_cache else None,
                "exclude_modules": self.excluded,
            },
        }

    def quantization_config(self, version: str) -> dict[str, Any]:
        """The same for config.json, in the words that its readers look for."""
        scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
        config = {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "config_groups": {
                "group_0": {"input_activations": scheme, "weights": scheme, "targets": ["Linear"]},
            },
            "ignore": self.excluded,
            "producer": {"name": "modelopt", "version": version},
        }
        return config | ({"kv_cache_scheme": scheme} if self.kv_cache else {})

    def describe(self, dtypes: dict[str, str]) -> str:
        """The table that is shown before anything starts: each layer, what it becomes, its size before and after."""
        rows = [f"{'layer':>5}  {'kind':<9}  {'FP8':>5}  {'kept':>5}  {'MB before':>10}  {'MB after':>10}"]
        after = self.table(dtypes)
        kinds = {"M": "Mamba", "*": "attention", "E": "MoE", "-": "MLP"}
        for number, letter in enumerate(self.arch.layers):
            names = [module for module in matrices(self.arch) if layer_of(module) == number]
            fp8 = sum(module in self.chosen for module in names)
            prefix = f"backbone.layers.{number}."
            sizes = [
                sum(_size(*entry) for name, entry in table.items() if name.startswith(prefix))
                for table in ({name: (dtypes[name], s.shape) for name, s in self.arch.tensors().items()}, after)
            ]
            note = "  KV cache FP8" if number in self.kv_layers else ""
            rows.append(
                f"{number:>5}  {kinds[letter]:<9}  {fp8:>5}  {len(names) - fp8:>5}  {sizes[0] / 1e6:>10.1f}  "
                f"{sizes[1] / 1e6:>10.1f}{note}"
            )
        total = sum(_size(*entry) for entry in after.values())
        before = sum(_size(dtypes[name], spec.shape) for name, spec in self.arch.tensors().items())
        rows.append(
            f"{len(self.chosen):,} of {len(matrices(self.arch)):,} matrices become FP8; embeddings, lm_head, routers, "
            f"norms and convolutions stay; {_amount(before)} become {_amount(total)}"
        )
        return "\n".join(rows)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    return count


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _match(patterns: list[str], names: list[str], what: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise UserError(f"{what}: {pattern!r} matches none of the {len(names)} matrices, such as {names[0]}")
        found |= matched
    return found
