"""What settings must satisfy whatever the layout, and what adapters ask of one: the recipe's rules and preflight's.

`finetune/checks.py` and `launch/plan/search.py` both call these. Imports neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.plan.layout import Layout
from launch.plan.nf4_weights import BLOCK, row_parallel
from launch.plan.plan_settings import Plan, TrainPlan
from nano3 import tensor_names
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.overrides import check_ranges
from nano3.targets import EMBEDDING, OUTPUT, AdapterKind, LoraSettings, Size, is_routed

ONE_PACK = (
    "a pack is one sequence with its own document boundaries (cu_seqlens), so a forward pass takes exactly one; for "
    "more tokens in it raise train.seq_length, for more packs per step train.global_batch"
)
"""Why a micro batch is one pack, and what to do instead."""
EXPERTS_ONLY = ("moe", "moe_act", "shared_experts")
"""What of `train.recompute` only a model with experts has."""


def check_settings(plan: Plan, arch: Arch) -> None:
    """Raises `UserError` for settings that mean nothing, or that no layout could train with."""
    check_ranges(plan)
    _check_recompute(plan.train.recompute, arch)
    _check_loss_chunk(plan, arch)
    if plan.method == "lora" and plan.micro_batch != 1:
        raise UserError(f"micro_batch={plan.micro_batch}: {ONE_PACK}")
    _check_ranks(plan.adapter_sizes(arch), arch, plan.lora.max_rank)


def _check_ranks(chosen: Mapping[str, Size], arch: Arch, most: int) -> None:
    """Raises `UserError` for a rank above what the reader takes, or above the width of the model, which no delta of its
    layers has."""
    for path, size in chosen.items():
        if most and size.rank > most:
            raise UserError(
                f"lora.rank: rank {size.rank} of {path} is above lora.max_rank={most}, which who loads the adapter "
                "takes at most; give a lower rank"
            )
        if size.rank > arch.hidden_size:
            raise UserError(
                f"lora.rank: rank {size.rank} of {path} must be at most {arch.hidden_size}, the model's hidden size: "
                "no change of a layer has a higher rank"
            )


def _check_recompute(chosen: Sequence[str], arch: Arch) -> None:
    """Raises `UserError` where one part of `train.recompute` already holds another, or is of experts there are none."""
    idle = [name for name in chosen if name in EXPERTS_ONLY]
    if idle and not arch.moe_layers:
        raise UserError(
            f"train.recompute={','.join(chosen)}: {', '.join(idle)} is of mixture-of-experts layers, and the model has "
            "none; choose mamba, layernorm or full"
        )
    for whole, parts in (("full", set(chosen) - {"full"}), ("moe", {"moe_act", "shared_experts"} & set(chosen))):
        if whole in chosen and parts:
            raise UserError(
                f"train.recompute={','.join(chosen)}: {whole} already covers {', '.join(sorted(parts))}; "
                f"leave out {whole} or the others"
            )


def _check_loss_chunk(plan: Plan, arch: Arch) -> None:
    """Raises `UserError` for a loss in chunks where the output layer learns: it has no gradient there."""
    chunk = plan.train.loss_chunk
    if chunk and plan.method == "full":
        raise UserError(f"train.loss_chunk={chunk} needs a frozen output layer, and method=full trains it; give 0")
    if chunk and OUTPUT in plan.adapter_sizes(arch):
        raise UserError(
            f"train.loss_chunk={chunk} needs a frozen output layer, and lora.targets names {OUTPUT}; "
            "leave it out or give train.loss_chunk=0"
        )


def check_cut(arch: Arch, plan: Plan, chosen: Mapping[str, Size], layout: Layout) -> None:
    """Raises `UserError` for packs, adapters (`chosen`, by path) or a base that this layout cannot cut."""
    _check_adapters(chosen, plan.lora, layout)
    _check_base(arch, plan.lora, layout)
    _check_packs(plan.train, layout)


def _check_base(arch: Arch, lora: LoraSettings, layout: Layout) -> None:
    """Raises `UserError` for a base in NF4 that this layout cannot cut: between rows anywhere, between columns only
    where a row is whole blocks of 64."""
    if lora.base != "nf4":
        return
    for number in range(len(arch.layers)):
        for linear in tensor_names.linears(arch, number):
            path = f"decoder.layers.{number}.{linear.module}"
            axis = "etp" if is_routed(path) else "tp"
            if linear.width % BLOCK and row_parallel(path) and getattr(layout, axis) > 1:
                raise UserError(
                    f"lora.base=nf4: layout.{axis}={getattr(layout, axis)} cuts the rows of {path}, which have "
                    f"{linear.width} values, no multiple of {BLOCK}; give layout.{axis}=1 or lora.base=original"
                )


def _check_packs(train: TrainPlan, layout: Layout) -> None:
    """Raises `UserError` for a `train.pad_multiple` with which this layout cannot cut the documents of a pack."""
    wanted, multiple = layout.document_multiple, train.pad_multiple
    if multiple < 0 or multiple % wanted:
        raise UserError(
            f"train.pad_multiple={multiple} must be a multiple of {wanted}, which layout.cp={layout.cp} needs, or 0"
        )
    if multiple and train.seq_length % multiple:
        raise UserError(f"train.seq_length={train.seq_length} must be a multiple of train.pad_multiple={multiple}")


def _check_adapters(chosen: Mapping[str, Size], lora: AdapterKind, layout: Layout) -> None:
    """Raises `UserError` for adapters, `chosen` by path, that this layout cannot cut.

    Those of dense layers are cut along their rank. Routed experts' and the embedding's are not.
    """
    for path, size in chosen.items():
        if size.rank % layout.tp and path != EMBEDDING and not is_routed(path):
            key = "lora.rank" if size.rank == lora.rank else "lora.rank_pattern"
            raise UserError(f"{key}: rank {size.rank} of {path} must be a multiple of layout.tp={layout.tp}")
