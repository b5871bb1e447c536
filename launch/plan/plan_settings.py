"""The settings of a run that memory, speed and checks depend on, with the recipe's names and defaults.

Imports neither torch nor NeMo. The recipe owns these settings (finetune/settings.py, which imports from here downwards
only); tests/launch/test_preflight.py holds names, types and defaults of the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from launch.plan.layout import Layout
from launch.plan.memory import IMBALANCE, Workload
from launch.plan.weights import Adapters
from nano3.arch import Arch
from nano3.targets import PRESETS, Size, select, sizes

Recompute = Literal["full", "moe", "moe_act", "shared_experts", "layernorm", "mamba"]


@dataclass
class LoraPlan:
    """The `lora` settings that take memory or time."""

    preset: Literal["all", "attention", "peft"] = "all"
    targets: list[str] = field(default_factory=list)
    rank: int = 32
    rank_pattern: list[str] = field(default_factory=list)
    dora: bool = False
    dropout: float = 0.0
    experts: Literal["shared", "each", "none"] = "shared"


@dataclass
class TrainPlan:
    """The `train` settings that take memory or time."""

    steps: int = 300
    micro_batch: int = 1
    global_batch: int = 128
    seq_length: int = 4096
    pad_multiple: int = 0
    recompute: list[Recompute] = field(default_factory=list)


@dataclass
class CheckpointPlan:
    """The `checkpoint` settings that take disk."""

    keep: int = 2


@dataclass
class Plan:
    """What is to be checked."""

    layout: Layout = field(default_factory=Layout)
    lora: LoraPlan = field(default_factory=LoraPlan)
    train: TrainPlan = field(default_factory=TrainPlan)
    checkpoint: CheckpointPlan = field(default_factory=CheckpointPlan)
    method: Literal["lora", "full"] = "lora"
    """`full`: all weights are trained. This project trains adapters only; the plan knows both, to compare."""
    imbalance: float = IMBALANCE
    """Tokens of the busiest rank's experts over an even share."""

    @property
    def document_multiple(self) -> int:
        """What every packed document's length is padded to."""
        return self.train.pad_multiple or self.layout.document_multiple

    def adapter_sizes(self, arch: Arch) -> dict[str, Size]:
        """Every adapter's rank by path, none when all weights are trained; `UserError` for targets that name nothing.

        Scales take neither memory nor time; here they are not the recipe's.
        """
        if self.method == "full":
            return {}
        lora = self.lora
        paths = select(arch, list(lora.targets or PRESETS[lora.preset]), lora.experts)
        return sizes(paths, lora.rank, float(lora.rank), lora.rank_pattern)

    def adapters(self, arch: Arch) -> Adapters | None:
        """The adapters, or None when all weights are trained."""
        if self.method == "full":
            return None
        ranks = {path: size.rank for path, size in self.adapter_sizes(arch).items()}
        return Adapters(ranks, self.lora.experts == "each", self.lora.dora, self.lora.dropout > 0)

    def workload(self, arch: Arch, ranks: int) -> Workload:
        """The plan on so many ranks."""
        train = self.train
        return Workload(
            arch=arch,
            layout=self.layout,
            ranks=ranks,
            seq_length=train.seq_length,
            global_batch=train.global_batch,
            adapters=self.adapters(arch),
            micro_batch=train.micro_batch,
            imbalance=self.imbalance,
            recompute=tuple(train.recompute),
        )

    def with_layout(self, layout: Layout, recompute: Sequence[Recompute] | None = None) -> Plan:
        """The same with another layout and, where given, recomputation."""
        train = self.train if recompute is None else replace(self.train, recompute=list(recompute))
        return replace(self, layout=layout, train=train)


def default_layout(arch: Arch, ranks_per_node: int) -> Layout:
    """Experts as wide as the GPUs of a node allow, nothing else split: what published evidence favours."""
    fitting = [size for size in range(1, ranks_per_node + 1) if ranks_per_node % size == 0]
    return Layout(ep=max(size for size in fitting if arch.n_routed_experts % size == 0) if arch.moe_layers else 1)
