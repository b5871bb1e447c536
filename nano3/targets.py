"""Which layers a LoRA target names, with what rank and scale, and the settings of an adapter. Imports no torch.

`AdapterKind` declares once what training, planning, `lora.json` and merging agree on.

Paths are Megatron-Core's with global layer numbers: `decoder.layers.5.self_attention.linear_qkv`. A target is a
module's last name (`linear_qkv`, `in_proj`) or a pattern with `*` over the path (`*.layers.5.*`, `*.shared_experts.*`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, TypeVar

from nano3.arch import Arch
from nano3.cli import UserError
from nano3.ranges import Range

Number = TypeVar("Number", int, float)

PRESETS = {
    "all": ("linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2"),
    "attention": ("linear_qkv", "linear_proj"),
    "peft": ("linear_qkv", "linear_proj", "in_proj", "*.mlp.[!e]*"),
}
"""Target lists by name. `all` is the list of NVIDIA's published recipe for this model (Megatron-Bridge). `peft` is what
Hugging Face PEFT 0.21 loads into plain linear layers of this model: it refuses out_proj of Mamba layers, and routed
experts (`mlp.experts`) are no linear layers in transformers 5, while shared ones and a dense MLP's are."""

EMBEDDING = "embedding.word_embeddings"
OUTPUT = "output_layer"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Adapted only when a target names them; no preset does."""

EXPERTS = ("shared", "each", "none")
"""`shared`: one adapter per layer for all its routed experts; `each`: one per expert; `none`: they stay untouched."""

_MODULES = {
    "M": ("mixer.in_proj", "mixer.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "E": (
        "mlp.experts.linear_fc1",
        "mlp.experts.linear_fc2",
        "mlp.shared_experts.linear_fc1",
        "mlp.shared_experts.linear_fc2",
    ),
    "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
}


@dataclass(frozen=True)
class Size:
    """Of one adapter. The delta is `scale` * B @ A with A (rank, in) and B (out, rank)."""

    rank: int
    scale: float


def adaptable_modules(arch: Arch) -> list[str]:
    """Every layer that can carry an adapter, by path, in the order of the model. The router is not among them."""
    layers = [f"decoder.layers.{n}.{name}" for n, letter in enumerate(arch.layers) for name in _MODULES[letter]]
    return [EMBEDDING, *layers, OUTPUT]


def is_routed(path: str) -> bool:
    """Whether the module at `path` is the routed experts' of a layer."""
    return ".mlp.experts." in path


def matches(target: str, path: str) -> bool:
    """Whether `target` names the module at `path`."""
    return fnmatchcase(path, target) if "*" in target else path.rsplit(".", 1)[-1] == target


def select(arch: Arch, targets: list[str] | tuple[str, ...], experts: str) -> list[str]:
    """Paths of the modules that get an adapter.

    Args:
        arch: the model.
        targets: names or patterns, see the module's docstring.
        experts: one of `EXPERTS`.

    Raises:
        UserError: a target names nothing, nothing is left, or `experts=each` meets no routed expert.
    """
    modules = adaptable_modules(arch)
    for target in targets:
        if not any(matches(target, path) for path in modules):
            names = sorted({path.rsplit(".", 1)[-1] for path in modules})
            raise UserError(
                f"LoRA target {target!r} matches no linear layer of this model (pattern {arch.pattern}); "
                f"there are {', '.join(names)}, or patterns such as '*.layers.0.*' over paths such as {modules[1]}"
            )
    if experts not in EXPERTS:
        raise UserError(f"lora.experts={experts!r} is not known; choose one of {', '.join(EXPERTS)}")
    chosen = [path for path in modules if any(matches(target, path) for target in targets)]
    if experts == "none":
        chosen = [path for path in chosen if not is_routed(path)]
    if not chosen:
        raise UserError("the LoRA targets leave no layer to adapt; give lora.targets or lora.preset=all")
    if experts == "each" and not arch.moe_layers:
        raise UserError("lora.experts=each: the model has no experts; leave it out")
    if experts == "each" and not any(map(is_routed, chosen)):
        raise UserError("lora.experts=each, but no target names routed experts; add linear_fc1 or linear_fc2")
    return chosen


def sizes(
    paths: Sequence[str],
    rank: int,
    alpha: float,
    rank_pattern: Iterable[str] = (),
    alpha_pattern: Iterable[str] = (),
    rslora: bool = False,
) -> dict[str, Size]:
    """Rank and scale of every adapted module.

    Args:
        paths: from `select`.
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: `target:value`; of several that name a module the last one holds. A rank of its own
            leaves alpha as it is, as in PEFT.
        rslora: the scale is alpha / sqrt(rank) instead of alpha / rank (rank-stabilized LoRA, arXiv 2312.03732).

    Raises:
        UserError: a pattern is malformed, names no adapted module, or later ones leave it nothing.
    """
    ranks = _by_pattern("lora.rank_pattern", rank_pattern, paths, _rank)
    alphas = _by_pattern("lora.alpha_pattern", alpha_pattern, paths, _alpha)
    result = {}
    for path in paths:
        own_rank, own_alpha = ranks.get(path, rank), alphas.get(path, alpha)
        result[path] = Size(own_rank, own_alpha / (math.sqrt(own_rank) if rslora else own_rank))
    return result


def _rank(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _alpha(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def _by_pattern(
    key: str, patterns: Iterable[str], paths: Sequence[str], parse: Callable[[str], Number]
) -> dict[str, Number]:
    """Module path -> value of the last pattern that names it."""
    owner: dict[str, str] = {}
    values: dict[str, Number] = {}
    patterns = list(patterns)
    for pattern in patterns:
        target, _, text = pattern.rpartition(":")
        try:
            value = parse(text if target else "")
        except ValueError:
            kind = "a positive whole number" if key.startswith("lora.rank") else "a positive number"
            raise UserError(f"{key}: {pattern!r} is not TARGET:VALUE with {kind}, such as in_proj:64") from None
        named = [path for path in paths if matches(target, path)]
        if not named:
            raise UserError(
                f"{key}: {pattern!r} names no adapted layer; there are {', '.join(sorted(_last_names(paths)))}"
            )
        owner.update(dict.fromkeys(named, pattern))
        values.update(dict.fromkeys(named, value))
    idle = [pattern for pattern in patterns if pattern not in owner.values()]
    if idle:
        raise UserError(f"{key}: later patterns name every layer of {idle[0]!r} again (the last one holds); remove it")
    return values


def _last_names(paths: Iterable[str]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths}


@dataclass
class AdapterKind:
    """What decides an adapter's shapes and values."""

    rank: Annotated[int, Range(1, 1 << 16)] = 32
    """Rows of A and columns of B; a multiple of layout.tp."""
    alpha: Annotated[float, Range(0, 1e6, above=True, why="at 0 the adapters change nothing")] = 32.0
    """The delta is multiplied by alpha / rank."""
    rank_pattern: list[str] = field(default_factory=list)
    """`target:rank` for some layers (`in_proj:64,*.layers.5.*:8`); of several that name a layer the last one holds."""
    alpha_pattern: list[str] = field(default_factory=list)
    """`target:alpha` for some layers, likewise; a rank of its own leaves a layer's alpha as it is."""
    rslora: bool = False
    """Rank-stabilized: the delta is multiplied by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Weight-decomposed: every output row of an adapted layer has a trained length; routed experts have theirs each."""
    experts: Literal["shared", "each", "none"] = "shared"
    """Routed experts: one adapter per layer for all of them, one for each, or none."""

    def kind(self) -> dict[str, Any]:
        """The fields of this class by name, whatever a subclass adds."""
        return {name: value for name, value in asdict(self).items() if name in KIND}

    def sizes_of(self, paths: Sequence[str]) -> dict[str, Size]:
        """Rank and scale of the adapters at these paths. Raises `UserError` for a pattern that cannot be."""
        return sizes(paths, self.rank, self.alpha, self.rank_pattern, self.alpha_pattern, self.rslora)


KIND = tuple(field.name for field in fields(AdapterKind))
"""Names of what decides an adapter's shapes and values."""


def _check_gated(mark: str, chosen: Iterable[str], dora: bool) -> None:
    """Raises `UserError` for adapters that cannot be switched on from a mark on."""
    if dora:
        raise UserError(
            f"lora.dora=true with lora.mark={mark!r}: DoRA's lengths are of whole rows, for every token; leave one out"
        )
    for path in chosen:
        if is_routed(path) or path in VOCABULARY:
            raise UserError(
                f"lora.mark={mark!r}: {path} cannot wait for a mark (routed experts get their tokens in another order, "
                "the vocabulary has no such input); give lora.preset=peft, or lora.experts=none"
            )


@dataclass
class LoraSettings(AdapterKind):
    """Which layers get an adapter, and how large."""

    preset: Literal["all", "attention", "peft"] = "all"
    """The targets by a name: all linear layers but router, embedding and lm_head; the attention layers' only; or what
    Hugging Face PEFT can load for this model."""
    targets: list[str] = field(default_factory=list)
    """Names (`in_proj`) or patterns (`*.layers.5.*`) instead of the preset's; empty: the preset's. Only here can
    `word_embeddings` and `output_layer` be named."""
    plus_ratio: Annotated[float, Range(0, 1e4, above=True)] = 1.0
    """LoRA+: the learning rate of B is this many times train.lr, which A has."""
    max_rank: Annotated[int, Range(0, 1 << 16)] = 0
    """Largest rank that the adapter's reader takes, such as vLLM's --max-lora-rank; more is refused. 0: any."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Probability on the adapters' input, while training; the embedding's adapter has no such input."""
    base: Literal["original", "nf4"] = "original"
    """The frozen linear layers: in 16 bits, or in 4 (NF4 with double quantization, QLoRA)."""
    mark: str = ""
    """Text, such as `[VERIFY]`, from whose last token to the end of the turn the adapters act; empty: they act
    everywhere. Not for DoRA, routed experts and the vocabulary: lora.preset=peft leaves them out."""
    init_from: str = ""
    """Adapter folder to start from: an earlier run's, or what `conversion/adapter.py import` wrote. The settings above,
    but for dropout and LoRA+, become its; the optimizer starts fresh. Empty: fresh adapters."""

    def chosen_targets(self) -> list[str]:
        """The targets, with the preset resolved."""
        return list(self.targets or PRESETS[self.preset])

    def paths(self, arch: Arch) -> list[str]:
        """Paths of the layers that get an adapter. Raises `UserError` for targets that name nothing, and for those that
        cannot wait for a mark."""
        chosen = select(arch, self.chosen_targets(), self.experts)
        if self.mark:
            _check_gated(self.mark, chosen, self.dora)
        return chosen

    def adapters(self, arch: Arch) -> dict[str, Size]:
        """Rank and scale of every adapter by path. Raises `UserError` for targets or patterns that cannot be."""
        return self.sizes_of(self.paths(arch))
