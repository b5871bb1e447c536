"""Parallel layouts: how a model and its data are cut over ranks. Imports neither torch nor NeMo.

What makes a layout a right one, and which ones come nearest to one that is refused: `launch/plan/layout_rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from math import lcm

from nano3.arch import Arch
from nano3.pipeline_parallel import stage_sizes


@dataclass
class Layout:
    """Sizes of the parallel groups. Whatever ranks they leave are data parallel."""

    tp: int = 1
    """Tensor parallel: ranks that share every matrix. Divides attention heads, Mamba heads and Mamba groups."""
    pp: int = 1
    """Pipeline parallel: stages of consecutive layers, cut so that the slowest is as fast as it can be."""
    cp: int = 1
    """Context parallel: ranks that share every sequence."""
    ep: int = 1
    """Expert parallel: ranks that share the routed experts of a layer. Divides the number of experts."""
    etp: int = 1
    """Expert tensor parallel: ranks that share every routed expert's matrices."""
    sp: bool | None = None
    """Sequence parallel: norms and residuals hold 1/tp of the sequence. None: on where tp > 1 (MoE needs it)."""

    @property
    def sequence_parallel(self) -> bool:
        """`sp`, with None resolved."""
        return self.tp > 1 if self.sp is None else self.sp

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model outside the experts and one share of a sequence: tp * pp * cp."""
        return self.tp * self.pp * self.cp

    @property
    def expert_parallel(self) -> int:
        """Ranks that hold one copy of the experts: ep * etp * pp."""
        return self.ep * self.etp * self.pp

    @property
    def smallest_world(self) -> int:
        """The fewest ranks that this layout fits on; every valid world size is a multiple of it."""
        return lcm(self.model_parallel, self.expert_parallel)

    @property
    def document_multiple(self) -> int:
        """What every packed document's length is padded to: under context parallelism each is cut into 2 * cp pieces.

        Source: `thd_get_partitioned_indices` of transformer-engine, which balances causal attention that way.
        """
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def sequence_multiple(self) -> int:
        """What a pack's length must be a multiple of: whole document pieces, equal shares of a sequence per rank."""
        return lcm(self.document_multiple, self.cp * self.tp if self.sequence_parallel else self.cp)

    def dp(self, world_size: int) -> int:
        """Data-parallel size of everything but the routed experts: different packs at a time."""
        return world_size // self.model_parallel

    def expert_dp(self, world_size: int) -> int:
        """Data-parallel size of the routed experts: copies of each expert."""
        return world_size // self.expert_parallel

    def settings(self, other: Layout) -> str:
        """The layout as settings: every size that is not 1, or not that of `other`."""
        plain = Layout()
        named = [
            (field.name, getattr(self, field.name))
            for field in fields(self)
            if not getattr(self, field.name) == getattr(plain, field.name) == getattr(other, field.name)
        ]
        return " ".join(f"layout.{name}={str(value).lower()}" for name, value in named) or "layout.tp=1"

    def describe(self, arch: Arch, world_size: int) -> str:
        """A table for people: every group's size and what one rank holds of the model."""
        rows = [
            ("ranks", world_size, ""),
            ("tensor (tp)", self.tp, f"{arch.num_attention_heads // self.tp} attention heads, "
             f"{arch.mamba_num_heads // self.tp} Mamba heads in {arch.n_groups // self.tp} groups per rank"),
            ("pipeline (pp)", self.pp, " | ".join(stages(arch, self.pp))),
            ("context (cp)", self.cp, "each rank holds 1/cp of every sequence"),
            ("expert (ep)", self.ep, f"{arch.n_routed_experts // self.ep} of {arch.n_routed_experts} experts per rank"
             if arch.moe_layers else "the model has no experts"),
            ("expert tensor (etp)", self.etp, ""),
            ("sequence (sp)", "on" if self.sequence_parallel else "off", ""),
            ("data (dp)", self.dp(world_size), "packs at a time"),
            ("expert data", self.expert_dp(world_size), "copies of each expert"),
        ]  # fmt: skip
        return "\n".join(f"  {name:<20}{size!s:>5}  {note}".rstrip() for name, size, note in rows)


def stages(arch: Arch, pp: int) -> list[str]:
    """The layer pattern of every pipeline stage, first to last; together they are the whole pattern."""
    ends = [0, *accumulate(stage_sizes(arch, pp))]
    return [arch.pattern[start:stop] for start, stop in pairwise(ends)]


AXES = ("tp", "pp", "cp", "ep", "etp")
"""Sizes of a layout, the axes along which another one is near."""
