"""What a run must satisfy whatever started it: the command line, NeMo-Run, a test. Imports neither torch nor NeMo."""

from __future__ import annotations

from launch.layout import validate
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.targets import EMBEDDING, check_sliced_experts, is_routed, select, sizes
from recipes.settings import Run, Settings, TrainSettings

ONE_PACK = (
    "a pack is one sequence with its own document boundaries (cu_seqlens), so a forward pass takes exactly one; for "
    "more tokens in it raise train.seq_length, for more packs per step train.global_batch"
)
"""Why a micro batch is one pack, and what to do instead."""


def check_run(task: Run, arch: Arch) -> None:
    """Raises `UserError` for a layout, targets or numbers with which the run could not be right."""
    settings = task.settings
    layout, train = settings.layout, settings.train
    validate(arch, layout, task.ranks, train.seq_length, train.global_batch, task.ranks_per_node)
    _check_numbers(settings)
    _check_recompute(train)
    _check_adapters(settings, arch)
    if train.micro_batch != 1:
        raise UserError(f"train.micro_batch={train.micro_batch}: {ONE_PACK}")
    _check_validation(task)


def _check_validation(task: Run) -> None:
    train = task.settings.train
    if train.validate_every and task.validation is None:
        raise UserError(f"train.validate_every={train.validate_every} needs --validation STORE")
    if train.patience and not train.validate_every:
        raise UserError(f"train.patience={train.patience} counts validations; give train.validate_every too")


def _check_adapters(settings: Settings, arch: Arch) -> None:
    layout, lora = settings.layout, settings.lora
    paths = select(arch, lora.chosen_targets(), lora.experts)
    if layout.etp > 1 and any(map(is_routed, paths)):
        check_sliced_experts(lora.experts, lora.dora, lora.dropout)
    for path, size in sizes(paths, lora.rank, lora.alpha, lora.rank_pattern, lora.alpha_pattern, lora.rslora).items():
        if size.rank % layout.tp and path != EMBEDDING and not is_routed(path):
            key = "lora.rank" if size.rank == lora.rank else "lora.rank_pattern"
            raise UserError(f"{key}: rank {size.rank} of {path} must be a multiple of layout.tp={layout.tp}")


def _check_numbers(settings: Settings) -> None:
    train, lora = settings.train, settings.lora
    for name, value, holds, rule in (
        ("train.steps", train.steps, train.steps >= 1, "at least 1"),
        ("train.warmup", train.warmup, 0 <= train.warmup < train.steps, f"from 0 to below train.steps={train.steps}"),
        ("train.lr", train.lr, train.lr > 0, "positive"),
        ("train.min_lr", train.min_lr, 0 <= train.min_lr <= train.lr, f"from 0 to train.lr={train.lr}"),
        *_schedule(train),
        ("train.beta2", train.beta2, 0 <= train.beta2 < 1, "at least 0 and below 1"),
        ("train.weight_decay", train.weight_decay, train.weight_decay >= 0, "at least 0"),
        ("train.clip", train.clip, train.clip > 0, "positive"),
        ("train.divergence", train.divergence, train.divergence == 0 or train.divergence > 1, "above 1, or 0"),
        (
            "train.validate_every",
            train.validate_every,
            0 <= train.validate_every <= train.steps,
            "from 0 to train.steps",
        ),
        ("train.patience", train.patience, train.patience >= 0, "at least 0"),
        ("train.min_improvement", train.min_improvement, train.min_improvement >= 0, "at least 0"),
        ("lora.rank", lora.rank, lora.rank >= 1, "at least 1"),
        ("lora.alpha", lora.alpha, lora.alpha > 0, "positive, or the adapters change nothing"),
        ("lora.dropout", lora.dropout, 0 <= lora.dropout < 1, "at least 0 and below 1"),
        ("lora.plus_ratio", lora.plus_ratio, lora.plus_ratio > 0, "positive"),
        ("checkpoint.every", settings.checkpoint.every, settings.checkpoint.every >= 0, "at least 0"),
        ("checkpoint.minutes", settings.checkpoint.minutes, settings.checkpoint.minutes >= 0, "at least 0"),
        ("checkpoint.keep", settings.checkpoint.keep, settings.checkpoint.keep >= 1, "at least 1"),
        ("log.every", settings.log.every, settings.log.every >= 1, "at least 1"),
    ):
        if not holds:
            raise UserError(f"{name}={value} must be {rule}")


def _check_recompute(train: TrainSettings) -> None:
    """Raises `UserError` where one part of `train.recompute` already holds another."""
    chosen = train.recompute
    for whole, parts in (("full", set(chosen) - {"full"}), ("moe", {"moe_act", "shared_experts"} & set(chosen))):
        if whole in chosen and parts:
            raise UserError(
                f"train.recompute={','.join(chosen)}: {whole} already covers {', '.join(sorted(parts))}; "
                f"leave out {whole} or the others"
            )


def _schedule(train: TrainSettings) -> list[tuple[str, float, bool, str]]:
    """Checks of the learning rate's schedule, as `_check_numbers` lists them."""
    if train.schedule == "wsd":
        left, fifth = train.steps - train.warmup, max(train.steps // 5, 1)
        return [("train.decay", train.decay, 1 <= train.decay <= left, f"from 1 to {left} with wsd, such as {fifth}")]
    falls = train.schedule == "cosine" or train.min_lr == 0
    return [
        ("train.decay", train.decay, train.decay == 0, f"0: train.schedule={train.schedule} has no decay of its own"),
        ("train.min_lr", train.min_lr, falls, "0: train.schedule=constant never falls"),
    ]
