"""Parallel layouts: how a model and its data are cut over ranks, checked before anything heavy is imported.

Imports neither torch nor NeMo, and answers at once, so that a login node can say what a cluster would refuse (or worse:
what it would accept and compute wrongly). Every rule names the place in megatron-core 0.16.1 that it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm

from nano3.arch import Arch
from nano3.cli import UserError


@dataclass
class Layout:
    """Sizes of the parallel groups. Whatever ranks they leave are data parallel."""

    tp: int = 1
    """Tensor parallel: ranks that share every matrix. Divides attention heads, Mamba heads and Mamba groups."""
    pp: int = 1
    """Pipeline parallel: stages of consecutive layers. Divides the number of layers."""
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

    def describe(self, arch: Arch, world_size: int) -> str:
        """A table for people: every group's size and what one rank holds of the model."""
        rows = [
            ("ranks", world_size, ""),
            ("tensor (tp)", self.tp, f"{arch.num_attention_heads // self.tp} attention heads, "
             f"{arch.mamba_num_heads // self.tp} Mamba heads in {arch.n_groups // self.tp} groups per rank"),
            ("pipeline (pp)", self.pp, " | ".join(stages(arch, self.pp))),
            ("context (cp)", self.cp, "each rank holds 1/cp of every sequence"),
            ("expert (ep)", self.ep, f"{arch.n_routed_experts // self.ep} of {arch.n_routed_experts} experts per rank"),
            ("expert tensor (etp)", self.etp, ""),
            ("sequence (sp)", "on" if self.sequence_parallel else "off", ""),
            ("data (dp)", self.dp(world_size), "packs at a time"),
            ("expert data", self.expert_dp(world_size), "copies of each expert"),
        ]  # fmt: skip
        return "\n".join(f"  {name:<20}{size!s:>5}  {note}".rstrip() for name, size, note in rows)


def stages(arch: Arch, pp: int) -> list[str]:
    """The layer pattern of every pipeline stage, first to last; `pp` must divide the layers."""
    size = len(arch.pattern) // pp
    return [arch.pattern[start : start + size] for start in range(0, pp * size, size)]


def validate(
    arch: Arch, layout: Layout, world_size: int, seq_length: int | None = None, global_batch: int | None = None
) -> None:
    """Raises `UserError` with the rule, its numbers and the nearest valid values if megatron-core could not train so.

    `world_size` is the number of ranks; `seq_length` the tokens of a pack and `global_batch` the packs of a step (micro
    batches hold one pack). Each of the two is checked where given.
    """
    for name in ("tp", "pp", "cp", "ep", "etp"):
        if getattr(layout, name) < 1:
            raise UserError(f"layout.{name} is {getattr(layout, name)}; it must be at least 1")
    if world_size < 1:
        raise UserError(f"the number of ranks is {world_size}; it must be at least 1")
    _check_tensor_parallel(arch, layout)
    _check_sequence_parallel(arch, layout)
    _check_pipeline(arch, layout)
    _check_context_parallel(arch, layout)
    _check_experts(arch, layout)
    _check_world(layout, world_size)
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
    valid = [size for size in _divisors(common) if kv_heads % size == 0 or size % kv_heads == 0]
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
    """Equal stages: `MambaStack` gives each layers // pp and drops the remainder without a word (mamba_block.py)."""
    layers = len(arch.pattern)
    if layers % layout.pp:
        left = f"{layers % layout.pp} of {layers} layers in no stage"
        rule = f"layout.pp must divide the layers: {layers} / {layout.pp} leaves {left}"
        raise _refused(rule, "layout.pp", layout.pp, _divisors(layers))


def _check_context_parallel(arch: Arch, layout: Layout) -> None:
    """Mamba layers swap sequence shares for head shares under CP (mamba_context_parallel.py)."""
    if not arch.mamba_layers:
        return
    heads, groups = arch.mamba_num_heads // layout.tp, arch.n_groups // layout.tp
    valid = [size for size in _divisors(heads) if groups % size == 0 or size % groups == 0]
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
            raise _refused(f"{name} must divide {what}: {count} / {size}", name, size, _divisors(count))


def _check_world(layout: Layout, world_size: int) -> None:
    """Both rank grids must fill the world (parallel_state.py, `initialize_model_parallel`)."""
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


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
