"""The rules of a right layout, each with the place in megatron-core 0.16.1 that it comes from.

Checked before anything heavy is imported, and at once, so that a login node can say what a cluster would refuse (or
worse: what it would accept and compute wrongly). A rule raises `UserError` with its numbers and, where one size alone
could be another, the nearest values of that size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import gcd, log2

from launch.plan.layout import AXES, Layout
from nano3.arch import Arch
from nano3.cli import UserError


def validate(
    arch: Arch,
    layout: Layout,
    world_size: int,
    seq_length: int | None = None,
    global_batch: int | None = None,
    ranks_per_node: int | None = None,
) -> None:
    """Raises `UserError` with the rule, its numbers and the nearest valid layouts if training could not go right.

    `world_size` is the number of ranks; `seq_length` the tokens of a pack and `global_batch` the packs of a step (micro
    batches hold one pack); `ranks_per_node` the ranks of a machine. The last three are checked where given.
    """
    rest = (world_size, seq_length, global_batch, ranks_per_node)
    try:
        check(arch, layout, *rest)
    except UserError as refused:
        near = [candidate.settings(layout) for candidate in nearest(arch, layout, *rest)]
        if not near:
            raise
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        raise UserError(f"{refused}; nearest valid on {ranks}: {' | '.join(near)}") from None


def nearest(
    arch: Arch,
    layout: Layout,
    world_size: int,
    seq_length: int | None = None,
    global_batch: int | None = None,
    ranks_per_node: int | None = None,
    number: int = 3,
) -> list[Layout]:
    """The valid layouts on these ranks that differ least: in the fewest sizes, then by the fewest doublings."""

    def distance(other: Layout) -> tuple[int, float, tuple[int, ...]]:
        pairs = [(max(1, getattr(layout, axis)), getattr(other, axis)) for axis in AXES]
        moved = [abs(log2(ours / theirs)) for ours, theirs in pairs if ours != theirs]
        return len(moved), sum(moved), tuple(theirs for _, theirs in pairs)

    found: list[Layout] = []
    for candidate in sorted(_candidates(arch, layout, world_size), key=distance):
        try:
            check(arch, candidate, world_size, seq_length, global_batch, ranks_per_node)
        except UserError:
            continue
        found.append(candidate)
        if len(found) == number:
            break
    return found


def _candidates(arch: Arch, layout: Layout, world_size: int) -> Iterator[Layout]:
    """Layouts that fill the ranks, before any other rule; expert tensor parallel ones only for who asked for it."""
    if world_size < 1:
        return
    fitting = divisors(world_size)
    experts = [size for size in fitting if arch.moe_layers and arch.n_routed_experts % size == 0] or [1]
    slices = [size for size in fitting if size == 1 or (layout.etp > 1 and arch.moe_intermediate_size % size == 0)]
    for tp, pp, cp in product([size for size in fitting if arch.n_groups % size == 0], fitting, fitting):
        if world_size % (tp * pp * cp) == 0 and pp <= len(arch.pattern):
            for ep, etp in product(experts, slices):
                if world_size % (ep * etp * pp) == 0:
                    sp = None if tp == 1 or layout.sp is False else layout.sp
                    yield replace(layout, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, sp=sp)


def check(
    arch: Arch,
    layout: Layout,
    world_size: int,
    seq_length: int | None = None,
    global_batch: int | None = None,
    ranks_per_node: int | None = None,
) -> None:
    """All rules; arguments as of `validate`."""
    for name in AXES:
        if getattr(layout, name) < 1:
            raise UserError(f"layout.{name} is {getattr(layout, name)}; it must be at least 1")
    if world_size < 1:
        raise UserError(f"the number of ranks is {world_size}; it must be at least 1")
    _check_tensor_parallel(arch, layout)
    _check_sequence_parallel(arch, layout)
    _check_pipeline(arch, layout)
    _check_context_parallel(arch, layout)
    _check_experts(arch, layout)
    _check_world(layout, world_size, ranks_per_node)
    _check_batch(layout, world_size, seq_length, global_batch)


def _check_tensor_parallel(arch: Arch, layout: Layout) -> None:
    """Heads, groups and widths over tp (mamba_mixer.py and transformer_config.py in `__post_init__`)."""
    whole: dict[str, int] = {}
    if arch.mamba_layers:
        whole.update({"Mamba heads (mamba_num_heads)": arch.mamba_num_heads, "Mamba groups (n_groups)": arch.n_groups})
    if arch.attention_layers:
        whole["attention heads (num_attention_heads)"] = arch.num_attention_heads
    if arch.moe_layers:
        width = arch.moe_shared_expert_intermediate_size
        whole["the shared experts' width (moe_shared_expert_intermediate_size)"] = width
    if arch.mlp_layers:
        whole["the MLP width (intermediate_size)"] = arch.intermediate_size
    common = gcd(*whole.values()) if whole else layout.tp
    kv_heads = arch.num_key_value_heads if arch.attention_layers else common
    valid = [size for size in divisors(common) if kv_heads % size == 0 or size % kv_heads == 0]
    for name, count in whole.items():
        if count % layout.tp:
            raise _refused(f"layout.tp must divide {name}: {count} / {layout.tp}", "layout.tp", layout.tp, valid)
    if layout.tp not in valid:
        rule = f"layout.tp must divide the KV heads (num_key_value_heads) or be a multiple of them: {kv_heads}"
        raise _refused(f"{rule} and {layout.tp}", "layout.tp", layout.tp, valid)


def _check_sequence_parallel(arch: Arch, layout: Layout) -> None:
    """SP needs TP (model_parallel_config.py), and MoE with TP needs SP (moe_layer.py refuses in its forward)."""
    if layout.sp and layout.tp == 1:
        raise UserError("layout.sp=true needs tensor parallelism, but layout.tp is 1; leave layout.sp out")
    if arch.moe_layers and layout.tp > 1 and not layout.sequence_parallel:
        raise UserError(
            f"layout.sp=false with layout.tp={layout.tp}: megatron-core trains MoE layers under tensor parallelism "
            "only with sequence parallelism; leave layout.sp out"
        )


def _check_pipeline(arch: Arch, layout: Layout) -> None:
    """A layer for every stage, one part of the model in each: mamba_block.py refuses virtual pipelines.

    Stages need not divide the layers: `nano3.pipeline_parallel` names the layers of the first and the last. Else
    `MambaStack` gives each layers // pp and drops the remainder without a word.
    """
    layers = len(arch.pattern)
    if layout.pp > layers:
        rule = f"layout.pp must leave a layer for every stage: {layers} layers, {layout.pp} stages"
        raise _refused(rule, "layout.pp", layout.pp, list(range(1, layers + 1)))


def _check_context_parallel(arch: Arch, layout: Layout) -> None:
    """Mamba layers swap sequence shares for head shares under CP (mamba_context_parallel.py)."""
    if not arch.mamba_layers:
        return
    heads, groups = arch.mamba_num_heads // layout.tp, arch.n_groups // layout.tp
    valid = [size for size in divisors(heads) if groups % size == 0 or size % groups == 0]
    if layout.cp not in valid:
        rule = (
            f"layout.cp must divide the Mamba heads of a tensor-parallel rank ({arch.mamba_num_heads} / {layout.tp} = "
            f"{heads}) and divide or be a multiple of its Mamba groups ({arch.n_groups} / {layout.tp} = {groups})"
        )
        raise _refused(rule, "layout.cp", layout.cp, valid)


def _check_experts(arch: Arch, layout: Layout) -> None:
    """Whole experts per rank (moe_layer.py), equal slices of each under expert tensor parallelism (experts.py)."""
    if not arch.moe_layers:
        if layout.ep * layout.etp > 1:
            raise UserError(
                f"layout.ep={layout.ep} layout.etp={layout.etp}: the model {arch.pattern} has no MoE layers"
            )
        return
    for name, size, what, count in (
        ("layout.ep", layout.ep, "the routed experts (n_routed_experts)", arch.n_routed_experts),
        ("layout.etp", layout.etp, "the experts' width (moe_intermediate_size)", arch.moe_intermediate_size),
    ):
        if count % size:
            raise _refused(f"{name} must divide {what}: {count} / {size}", name, size, divisors(count))


def _check_world(layout: Layout, world_size: int, ranks_per_node: int | None) -> None:
    """Both rank grids must fill the world (parallel_state.py, `initialize_model_parallel`).

    A tensor-parallel group, consecutive ranks that exchange activations several times a layer, must not leave its node.
    """
    for formula, size in (
        (f"tp * pp * cp = {layout.tp} * {layout.pp} * {layout.cp}", layout.model_parallel),
        (f"ep * etp * pp = {layout.ep} * {layout.etp} * {layout.pp}", layout.expert_parallel),
    ):
        if world_size % size:
            valid = [layout.smallest_world * (world_size // layout.smallest_world + more) for more in (0, 1)]
            ranks = " or ".join(str(number) for number in valid if number)
            raise UserError(
                f"the number of ranks must be a multiple of {formula} = {size}, but it is {world_size}; "
                f"use {ranks} ranks, or smaller groups"
            )

    if ranks_per_node is not None and ranks_per_node % layout.tp:
        rule = (
            f"layout.tp must divide the ranks of a node, or a tensor-parallel group spans nodes: "
            f"{ranks_per_node} / {layout.tp}"
        )
        raise _refused(rule, "layout.tp", layout.tp, divisors(ranks_per_node))


def _check_batch(layout: Layout, world_size: int, seq_length: int | None, global_batch: int | None) -> None:
    """Equal shares of a sequence over cp and tp ranks, and whole packs for every data-parallel rank."""
    for name, value, multiple, why in (
        (
            "train.seq_length",
            seq_length,
            layout.sequence_multiple,
            f"cp {layout.cp}, tp {layout.tp}, sequence parallel {'on' if layout.sequence_parallel else 'off'}",
        ),
        ("train.global_batch", global_batch, layout.dp(world_size), f"{world_size} ranks are data parallel so often"),
    ):
        if value is not None and (value < 1 or value % multiple):
            nearest = sorted({max(1, value // multiple) * multiple, (max(0, value) // multiple + 1) * multiple})
            raise UserError(
                f"{name} must be a positive multiple of {multiple} ({why}), but it is {value}; "
                f"nearest: {', '.join(str(number) for number in nearest)}"
            )


def _refused(rule: str, name: str, value: int, valid: list[int]) -> UserError:
    """The error for a size that is not among the `valid` ones: rule, then up to four nearest values."""
    nearest = sorted(sorted(valid, key=lambda size: (abs(size - value), size))[:4])
    return UserError(f"{rule}; nearest valid {name}: {', '.join(str(size) for size in nearest)}")


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in order."""
    return [size for size in range(1, number + 1) if number % size == 0]
