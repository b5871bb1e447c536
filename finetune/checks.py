"""What a run must satisfy whatever started it: the command line, NeMo-Run, a test. Imports neither torch nor NeMo."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from finetune.settings import LoraSettings, Run, Settings, TrainSettings
from launch.plan.layout_rules import validate
from launch.plan.plan_settings import CheckpointPlan, LoraPlan, Plan, TrainPlan
from launch.plan.rules import check_adapters, check_packs, check_settings
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.targets import Size, select, sizes


def plan_of(settings: Settings) -> Plan:
    """The settings as far as memory, speed and the rules of launch/ look at them."""

    def of(kind: Any, group: Any) -> Any:
        return kind(**{field.name: getattr(group, field.name) for field in fields(kind)})

    return Plan(
        layout=settings.layout,
        lora=of(LoraPlan, settings.lora),
        train=of(TrainPlan, settings.train),
        checkpoint=of(CheckpointPlan, settings.checkpoint),
    )


def check_run(run: Run, arch: Arch) -> None:
    """Raises `UserError` for a layout, targets or numbers with which the run could not be right."""
    settings = run.settings
    layout, train = settings.layout, settings.train
    validate(arch, layout, run.ranks, train.seq_length, train.global_batch, run.ranks_per_node)
    plan = plan_of(settings)
    check_settings(plan, arch)
    _check_numbers(settings)
    check_adapters(_adapters(settings.lora, arch), plan.lora, layout)
    check_packs(plan.train, layout)
    _check_validation(run)


def _check_validation(run: Run) -> None:
    train = run.settings.train
    if train.validate_every and run.validation is None:
        raise UserError(f"train.validate_every={train.validate_every} needs --validation STORE")
    if train.patience and not train.validate_every:
        raise UserError(f"train.patience={train.patience} counts validations; give train.validate_every too")


def _adapters(lora: LoraSettings, arch: Arch) -> dict[str, Size]:
    """Rank and scale of every adapter; `UserError` for a pattern that cannot be."""
    paths = select(arch, lora.chosen_targets(), lora.experts)
    return sizes(paths, lora.rank, lora.alpha, lora.rank_pattern, lora.alpha_pattern, lora.rslora)


def _check_numbers(settings: Settings) -> None:
    train, lora = settings.train, settings.lora
    for name, value, holds, rule in (
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
        ("lora.alpha", lora.alpha, lora.alpha > 0, "positive, or the adapters change nothing"),
        ("lora.plus_ratio", lora.plus_ratio, lora.plus_ratio > 0, "positive"),
        ("checkpoint.every", settings.checkpoint.every, settings.checkpoint.every >= 0, "at least 0"),
        ("checkpoint.minutes", settings.checkpoint.minutes, settings.checkpoint.minutes >= 0, "at least 0"),
        ("log.every", settings.log.every, settings.log.every >= 1, "at least 1"),
    ):
        if not holds:
            raise UserError(f"{name}={value} must be {rule}")


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
