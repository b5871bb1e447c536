"""The architecture of a Nemotron-H hybrid model and what follows from it. Imports neither torch nor NeMo.

The layer pattern is one letter per layer: `M` Mamba-2, `*` attention, `E` mixture of experts, `-` dense MLP. Everything
else that this project says about the model follows from the pattern and the widths: which layers attend, which tensors
a checkpoint holds, how many parameters there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nano3.cli import UserError
from nano3.hf_config import architecture_fields, read_config

LETTERS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}

PRESETS = {
    name: Path(__file__).parent / "presets" / name
    for name in ("nano", "nano-4b", "nano-9b-v2", "nano-12b-v2", "nemotron-h-8b", "pico")
}
"""`nano`: the config.json of Nemotron-3-Nano-30B-A3B, no weights. `pico`: a complete small model of this repository.
The others: the network of the family's dense members, for planning; their fields are from public copies of config.json.
"""


MTP = "mtp."
"""How the tensors of multi-token prediction begin, in the published checkpoints that have such heads. transformers does
not load them, and nothing here runs or tunes them: they pass every conversion as the bytes that they are."""

VOCAB_MULTIPLE = 128
"""Vocabulary rows per tensor-parallel rank are padded to a multiple of this (NeMo's make_vocab_size_divisible_by)."""


def padded_vocab_size(vocab_size: int, tensor_parallel: int = 1) -> int:
    """Vocabulary rows of a model in Megatron: the next multiple of 128 * TP, as NeMo and Megatron-LM pad it."""
    multiple = VOCAB_MULTIPLE * tensor_parallel
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a Hugging Face checkpoint.

    `dtype` is what we expect, in the words of safetensors headers; files may differ, and what they say is kept.
    `family` says what the tensor belongs to: embedding, lm_head, mamba, attention, routed_experts, shared_experts,
    router, router_bias (a buffer, not a parameter), mlp, norms.
    """

    shape: tuple[int, ...]
    dtype: str
    family: str

    @property
    def count(self) -> int:
        """Number of values."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(frozen=True)
class Arch:
    """What the network is. Fields carry the names of config.json; `pattern` is its hybrid_override_pattern.

    The experts' sizes of a dense model are 0: no layer of its pattern is an `E`.
    """

    pattern: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    intermediate_size: int
    max_position_embeddings: int
    routed_scaling_factor: float
    layer_norm_epsilon: float
    initializer_range: float
    num_nextn_predict_layers: int = 0
    """Heads of multi-token prediction; where there are some, a checkpoint has tensors that begin with `MTP`."""
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set(LETTERS))
        if unknown or not self.pattern:
            raise UserError(
                f"layer pattern {self.pattern!r} has unknown letters {unknown}; known are "
                + ", ".join(f"{letter} ({meaning})" for letter, meaning in LETTERS.items())
            )
        for part, whole in (("num_key_value_heads", "num_attention_heads"), ("n_groups", "mamba_num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise UserError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts {self.n_routed_experts}"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str = "config.json") -> Arch:
        """Reads a config.json, the original or one that transformers 5 rewrote.

        Raises `UserError` naming the field when one is missing, unknown, malformed, or has a value that we do not
        support. `source` is how messages call the file.
        """
        return cls(**architecture_fields(config, source))

    @classmethod
    def load(cls, path: Path | str) -> Arch:
        """Reads `path`, a config.json or a folder with one. Raises `UserError` when there is none or it is refused."""
        return cls.from_config(read_config(path), str(path))

    def differences(self, other: Arch) -> list[str]:
        """What differs between two architectures, as `field: mine != other's`; the dtype label is no difference."""
        return [
            f"{field.name}: {getattr(self, field.name)} != {getattr(other, field.name)}"
            for field in fields(self)
            if field.name != "dtype" and getattr(self, field.name) != getattr(other, field.name)
        ]

    @property
    def layers(self) -> tuple[str, ...]:
        """The letter of every layer, numbered from 0."""
        return tuple(self.pattern)

    def layers_of(self, letter: str) -> tuple[int, ...]:
        """Numbers of the layers with this letter."""
        return tuple(number for number, kind in enumerate(self.pattern) if kind == letter)

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        return self.layers_of("M")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return self.layers_of("*")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return self.layers_of("E")

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        return self.layers_of("-")

    @property
    def feeding_mamba_layers(self) -> tuple[int, ...]:
        """The Mamba layers directly before an attention layer (kept BF16 by the published FP8 recipe)."""
        return tuple(n - 1 for n in self.attention_layers if n > 0 and self.pattern[n - 1] == "M")

    @property
    def mamba_inner_size(self) -> int:
        """Width of the Mamba mixer; config.json's `expand` has no part in it."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_sections(self) -> tuple[tuple[str, int], ...]:
        """Rows of in_proj from top to bottom: gate z, input x, B and C of all groups, one dt per head."""
        states = self.n_groups * self.ssm_state_size
        inner = self.mamba_inner_size
        return ("z", inner), ("x", inner), ("B", states), ("C", states), ("dt", self.mamba_num_heads)

    @property
    def conv_sections(self) -> tuple[tuple[str, int], ...]:
        """Channels of the convolution: x, B, C."""
        return self.mamba_sections[1:4]

    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor of a Hugging Face checkpoint, by name, layer after layer; shapes as stored there.

        Those of multi-token prediction (`MTP`) are not among them: whatever begins so belongs to the heads.
        """
        return _tensors(self)

    def parameter_count(self) -> dict[str, int]:
        """Values by family (see `TensorSpec`), `router_bias` included though it is a buffer."""
        count: Counter[str] = Counter()
        for spec in self.tensors().values():
            count[spec.family] += spec.count
        return dict(count)

    @property
    def parameters(self) -> int:
        """All parameters; the router's correction bias is a buffer and not counted."""
        return sum(count for family, count in self.parameter_count().items() if family != "router_bias")

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but the routed experts that are not chosen for it."""
        if not self.moe_layers:
            return self.parameters
        routed = self.parameter_count()["routed_experts"]
        return self.parameters - routed + routed * self.num_experts_per_tok // self.n_routed_experts

    def _mixer(self, letter: str) -> Iterator[tuple[str, TensorSpec]]:
        """Tensors of one layer's mixer: name behind `mixer.` and what it is."""
        hidden = self.hidden_size
        if letter == "M":
            yield from self._mamba()
        elif letter == "*":
            for name, heads in (
                ("q", self.num_attention_heads),
                ("k", self.num_key_value_heads),
                ("v", self.num_key_value_heads),
            ):
                yield f"{name}_proj.weight", TensorSpec((heads * self.head_dim, hidden), self.dtype, "attention")
            yield (
                "o_proj.weight",
                TensorSpec((hidden, self.num_attention_heads * self.head_dim), self.dtype, "attention"),
            )
        elif letter == "E":
            experts = self.n_routed_experts
            yield "gate.weight", TensorSpec((experts, hidden), self.dtype, "router")
            yield "gate.e_score_correction_bias", TensorSpec((experts,), "F32", "router_bias")
            for expert in range(experts):
                yield from self._feed_forward(f"experts.{expert}.", self.moe_intermediate_size, "routed_experts")
            yield from self._feed_forward("shared_experts.", self.moe_shared_expert_intermediate_size, "shared_experts")
        else:
            yield from self._feed_forward("", self.intermediate_size, "mlp")

    def _feed_forward(self, prefix: str, width: int, family: str) -> Iterator[tuple[str, TensorSpec]]:
        yield f"{prefix}up_proj.weight", TensorSpec((width, self.hidden_size), self.dtype, family)
        yield f"{prefix}down_proj.weight", TensorSpec((self.hidden_size, width), self.dtype, family)

    def _mamba(self) -> Iterator[tuple[str, TensorSpec]]:
        heads = self.mamba_num_heads
        channels = sum(rows for _, rows in self.conv_sections)
        shapes: dict[str, tuple[int, ...]] = {
            "A_log": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "conv1d.weight": (channels, 1, self.conv_kernel),
            "conv1d.bias": (channels,),
            "in_proj.weight": (sum(rows for _, rows in self.mamba_sections), self.hidden_size),
            "norm.weight": (self.mamba_inner_size,),
            "out_proj.weight": (self.hidden_size, self.mamba_inner_size),
        }
        for name, shape in shapes.items():
            yield name, TensorSpec(shape, "F32" if name in ("A_log", "D") else self.dtype, "mamba")


@lru_cache(maxsize=8)
def _tensors(arch: Arch) -> Mapping[str, TensorSpec]:
    outer = TensorSpec((arch.vocab_size, arch.hidden_size), arch.dtype, "embedding")
    norm = TensorSpec((arch.hidden_size,), arch.dtype, "norms")
    result = {"backbone.embeddings.weight": outer}
    for number, letter in enumerate(arch.pattern):
        result[f"backbone.layers.{number}.norm.weight"] = norm
        for name, spec in arch._mixer(letter):
            result[f"backbone.layers.{number}.mixer.{name}"] = spec
    result["backbone.norm_f.weight"] = norm
    result["lm_head.weight"] = replace(outer, family="lm_head")
    return MappingProxyType(result)


def is_nemo_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a NeMo checkpoint as `conversion/hf_to_nemo.py` writes them."""
    return (folder / "weights").is_dir() and (folder / "hf").is_dir()


def resolve_model(name_or_path: str | Path) -> Path:
    """The folder of a preset (`PRESETS`) or of a path to a model folder; `UserError` when there is neither."""
    path = PRESETS.get(str(name_or_path), Path(name_or_path))
    if is_nemo_checkpoint(path):
        raise UserError(f"{name_or_path} is a NeMo checkpoint; give a Hugging Face folder (conversion/nemo_to_hf.py)")
    if not (path / "config.json").is_file():
        raise UserError(
            f"model {str(name_or_path)!r} is neither a preset ({', '.join(PRESETS)}) nor a folder with a config.json"
        )
    return path
