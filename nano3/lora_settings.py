"""The settings of an adapter, declared once: what training, planning, `lora.json` and merging agree on. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from nano3.arch import Arch
from nano3.ranges import Range
from nano3.targets import PRESETS, Size, select, sizes


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
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Probability on the adapters' input, while training; the embedding's adapter has no such input."""
    init_from: str = ""
    """Adapter folder to start from: an earlier run's, or what `conversion/adapter.py import` wrote. The settings above,
    but for dropout and LoRA+, become its; the optimizer starts fresh. Empty: fresh adapters."""

    def chosen_targets(self) -> list[str]:
        """The targets, with the preset resolved."""
        return list(self.targets or PRESETS[self.preset])

    def paths(self, arch: Arch) -> list[str]:
        """Paths of the layers that get an adapter. Raises `UserError` for targets that name nothing."""
        return select(arch, self.chosen_targets(), self.experts)

    def adapters(self, arch: Arch) -> dict[str, Size]:
        """Rank and scale of every adapter by path. Raises `UserError` for targets or patterns that cannot be."""
        return self.sizes_of(self.paths(arch))
