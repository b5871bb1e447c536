"""Which layouts would do: all valid ones on these ranks, planned, and ranked by their estimated speed.

Imports neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.plan.hardware import GIB, Gpu
from launch.plan.layout import Layout
from launch.plan.layout_rules import check, nearest
from launch.plan.memory import MemoryPlan, plan_memory
from launch.plan.plan_settings import Plan, Recompute
from launch.plan.rules import check_cut
from launch.plan.throughput import Estimate, estimate
from nano3.arch import Arch
from nano3.cli import UserError

RECOMPUTE: tuple[tuple[Recompute, ...], ...] = ((), ("moe_act",), ("moe", "layernorm"), ("full",))
"""What is tried where a layout does not fit as it is, cheapest first."""
NEARLY = 0.05
"""Estimates closer than this are taken as equal."""
ROOMY = 0.9
"""Of the GPU's memory: what a recommended layout takes at most, where there is one."""
EVERY = 1_000_000
"""More layouts than there are."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, with what it recomputes."""

    plan: Plan
    memory: MemoryPlan
    speed: Estimate

    def row(self, gpu: Gpu, asked: Plan) -> str:
        """One line: settings that differ from the recipe's defaults or from those `asked` for, memory, speed."""
        train = self.plan.train
        settings = self.plan.layout.settings(asked.layout)
        settings += f" train.recompute={','.join(train.recompute)}" if train.recompute else ""
        for name in ("seq_length", "global_batch"):
            if getattr(train, name) != getattr(asked.train, name):
                settings += f" train.{name}={getattr(train, name)}"
        used = self.memory.tightest.total / GIB
        return (
            f"  {settings:<60}{used:7.1f} GiB{used / gpu.memory_gib:6.0%}{self.speed.tokens_per_second:9,.0f} tok/s/GPU"
        )


def valid_layouts(arch: Arch, plan: Plan, ranks: int, per_node: int) -> list[Layout]:
    """Every valid layout on these ranks that can cut the adapters; expert tensor parallel ones for who asked for it."""
    train, chosen = plan.train, plan.adapter_sizes(arch)
    found = nearest(
        arch, Layout(etp=plan.layout.etp), ranks, train.seq_length, train.global_batch, per_node, number=EVERY
    )

    def can(layout: Layout) -> bool:
        try:
            check_cut(arch, plan, chosen, layout)
        except UserError:
            return False
        return True

    return list(filter(can, found))


def refuse_layout(arch: Arch, plan: Plan, ranks: int, per_node: int) -> None:
    """Raises `UserError` with the rule that the layout breaks, megatron-core's or the adapters'."""
    train = plan.train
    check(arch, plan.layout, ranks, train.seq_length, train.global_batch, per_node)
    check_cut(arch, plan, plan.adapter_sizes(arch), plan.layout)


def fitting(arch: Arch, plan: Plan, gpu: Gpu, ranks: int, per_node: int) -> list[Candidate]:
    """All valid layouts that fit, of each the least recomputation that fits; the recommended one first.

    Estimates within `NEARLY` of each other say nothing, so of the fastest those that leave room come first, and of
    these the one that needs least memory; the others follow by speed.
    """
    layouts = valid_layouts(arch, plan, ranks, per_node)
    found = [candidate for layout in layouts for candidate in _first_that_fits(arch, plan, gpu, ranks, layout)]
    if not found:
        return []
    found.sort(key=lambda candidate: (-candidate.speed.tokens_per_second, candidate.memory.tightest.total))
    roomy = [candidate for candidate in found if candidate.memory.tightest.total <= ROOMY * gpu.memory] or found
    enough = roomy[0].speed.tokens_per_second * (1 - NEARLY)
    fast = [candidate for candidate in roomy if candidate.speed.tokens_per_second >= enough]
    best = min(fast, key=lambda candidate: (len(candidate.plan.train.recompute), candidate.memory.tightest.total))
    return [best, *(candidate for candidate in found if candidate is not best)]


def _first_that_fits(arch: Arch, plan: Plan, gpu: Gpu, ranks: int, layout: Layout) -> Iterator[Candidate]:
    tried = [tuple(plan.train.recompute)] if plan.train.recompute else RECOMPUTE
    for recompute in tried:
        mine = plan.with_layout(layout, recompute)
        work = mine.workload(arch, ranks)
        memory = plan_memory(work)
        if memory.fits(gpu):
            yield Candidate(mine, memory, estimate(work, gpu))
            return


def recommend(arch: Arch, gpu: Gpu, nodes: int, seq_length: int, plan: Plan | None = None) -> Candidate | None:
    """The layout to start with for LoRA on so many nodes at this pack length; None when none fits.

    The global batch is the recipe's, made larger where the data-parallel ranks are more.
    """
    plan = plan or Plan()
    ranks = nodes * gpu.gpus_per_node
    batch = -(-plan.train.global_batch // ranks) * ranks
    plan = replace(plan, train=replace(plan.train, seq_length=seq_length, global_batch=batch))
    return next(iter(fitting(arch, plan, gpu, ranks, gpu.gpus_per_node)), None)
