"""The settings of a run that memory, speed and checks depend on, with the recipe's names and defaults.

Imports neither torch nor NeMo. finetune/settings.py adds what training alone needs to these groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from launch.plan.layout import Layout
from launch.plan.layout_rules import divisors
from launch.plan.memory import IMBALANCE, Workload
from launch.plan.weights import Adapters
from nano3.arch import Arch
from nano3.ranges import MOST_STEPS, Range
from nano3.targets import LoraSettings, Size

Recompute = Literal["full", "moe", "moe_act", "shared_experts", "layernorm", "mamba"]


@dataclass
class TrainPlan:
    """The `train` settings that take memory or time."""

    steps: Annotated[int | None, Range(1, MOST_STEPS)] = None
    """Optimizer steps. None: as many as `epochs` takes."""
    epochs: Annotated[float | None, Range(0, 1000, above=True)] = None
    """Passes over the training data, instead of `steps`. None, and no steps: three passes."""
    global_batch: Annotated[int, Range(1, 1 << 20)] = 128
    """Packs per step over all ranks."""
    seq_length: Annotated[int, Range(0, 1 << 20)] = 4096
    """Positions in a pack; the token store must have a pack index of this length."""
    pad_multiple: Annotated[int, Range(0, 1 << 20)] = 0
    """Every document in a pack takes a multiple of this many positions; 0: what the layout needs, 2 * layout.cp where
    that is above 1. A run can resume under any layout.cp that its multiple fits."""
    recompute: list[Recompute] = field(default_factory=list)
    """What the backward pass computes again instead of keeping: `full`, or some of moe, moe_act, shared_experts,
    layernorm, mamba."""
    loss_chunk: Annotated[int, Range(0, 1 << 20)] = 0
    """Positions of a pack whose logits exist at a time, on each context-parallel rank; 0: all. Not with an adapter of
    the output layer."""


@dataclass
class CheckpointPlan:
    """The `checkpoint` settings that take disk."""

    keep: Annotated[int, Range(1, 1e6)] = 2
    """Checkpoints that stay, the newest; at least 1."""


@dataclass
class Plan:
    """What is to be checked."""

    layout: Layout = field(default_factory=Layout)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainPlan = field(default_factory=TrainPlan)
    checkpoint: CheckpointPlan = field(default_factory=CheckpointPlan)
    method: Literal["lora", "full"] = "lora"
    """`full`: all weights are trained. This project trains adapters only; the plan knows both, to compare."""
    micro_batch: Annotated[int, Range(1, 1024)] = 1
    """Packs per forward pass of a rank, with method=full; adapters are trained on one."""
    imbalance: Annotated[float, Range(1, 1e3, why="nothing is more even than an even share")] = IMBALANCE
    """Tokens of the busiest rank's experts over an even share."""

    @property
    def document_multiple(self) -> int:
        """What every packed document's length is padded to."""
        return self.train.pad_multiple or self.layout.document_multiple

    def adapter_sizes(self, arch: Arch) -> dict[str, Size]:
        """Every adapter by path, none when all weights are trained; `UserError` for targets that name nothing."""
        return {} if self.method == "full" else self.lora.adapters(arch)

    def adapters(self, arch: Arch) -> Adapters | None:
        """The adapters, or None when all weights are trained."""
        if self.method == "full":
            return None
        ranks = {path: size.rank for path, size in self.adapter_sizes(arch).items()}
        return Adapters(ranks, self.lora.experts == "each", self.lora.dora, self.lora.dropout > 0)

    @property
    def nf4(self) -> bool:
        """Whether the frozen linear layers are in 4 bits."""
        return self.method == "lora" and self.lora.base == "nf4"

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
            micro_batch=self.micro_batch,
            imbalance=self.imbalance,
            recompute=tuple(train.recompute),
            loss_chunk=train.loss_chunk,
            nf4=self.nf4,
        )

    def with_layout(self, layout: Layout, recompute: Sequence[Recompute] | None = None) -> Plan:
        """The same with another layout and, where given, recomputation."""
        train = self.train if recompute is None else replace(self.train, recompute=list(recompute))
        return replace(self, layout=layout, train=train)


def default_layout(arch: Arch, ranks_per_node: int) -> Layout:
    """Experts as wide as the GPUs of a node allow, nothing else split: what published evidence favours."""
    return Layout(
        ep=max(size for size in divisors(ranks_per_node) if arch.n_routed_experts % size == 0) if arch.moe_layers else 1
    )
