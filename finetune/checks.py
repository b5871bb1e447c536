"""What a run must satisfy whatever started it: the command line, NeMo-Run, a test. Imports neither torch nor NeMo."""

from __future__ import annotations

from finetune.settings import Run, Settings, TrainSettings
from launch.plan.layout_rules import validate
from launch.plan.plan_settings import Plan
from launch.plan.rules import check_cut, check_settings
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.overrides import check_ranges


def plan_of(settings: Settings) -> Plan:
    """The settings as far as memory, speed and the rules of launch/ look at them."""
    return Plan(settings.layout, settings.lora, settings.train, settings.checkpoint)


def check_run(run: Run, arch: Arch) -> None:
    """Raises `UserError` for a layout, targets or numbers with which the run could not be right."""
    settings = run.settings
    check_ranges(settings)
    layout, train = settings.layout, settings.train
    validate(arch, layout, run.ranks, train.seq_length, train.global_batch, run.ranks_per_node)
    plan = plan_of(settings)
    check_settings(plan, arch)
    if settings.router == "balance" and not arch.moe_layers:
        raise UserError("router=balance: the model has no experts, and so no router; leave it out")
    _check_numbers(settings)
    check_cut(arch, plan, plan.adapter_sizes(arch), layout)
    _check_validation(run)


def _check_validation(run: Run) -> None:
    train = run.settings.train
    if train.validate_every and run.validation is None:
        raise UserError(f"train.validate_every={train.validate_every} needs --validation STORE")
    if train.patience and not train.validate_every:
        raise UserError(f"train.patience={train.patience} counts validations; give train.validate_every too")


def _check_numbers(settings: Settings) -> None:
    """Raises `UserError` for numbers that do not fit each other; `check_ranges` has looked at each by itself."""
    train = settings.train
    if train.steps is not None and train.epochs is not None:
        raise UserError(
            f"train.steps={train.steps} and train.epochs={train.epochs:g} both say how long to train; leave one out"
        )
    if train.warmup >= 1 and train.warmup != int(train.warmup):
        raise UserError(f"train.warmup={train.warmup} must be a share below 1, or a whole number of steps")
    rules = [("train.min_lr", train.min_lr, train.min_lr <= train.lr, f"at most train.lr={train.lr}")]
    rules += [*_length(train), *_schedule(train)]
    for name, value, holds, rule in rules:
        if not holds:
            raise UserError(f"{name}={value} must be {rule}")


def _length(train: TrainSettings) -> list[tuple[str, float, bool, str]]:
    """Checks against the number of steps, as `_check_numbers` lists them; none while that is not derived yet."""
    if train.steps is None:
        return []
    return [
        ("train.warmup", train.warmup, train.warmup_steps < train.steps, f"below train.steps={train.steps}"),
        ("train.validate_every", train.validate_every, train.validate_every <= train.steps, "at most train.steps"),
    ]


def _schedule(train: TrainSettings) -> list[tuple[str, float, bool, str]]:
    """Checks of the learning rate's schedule, as `_check_numbers` lists them."""
    if train.schedule == "wsd":
        if train.steps is None:
            return [("train.decay", train.decay, train.decay >= 1, "at least 1 with wsd, such as a fifth of the steps")]
        left, fifth = train.steps - train.warmup_steps, max(train.steps // 5, 1)
        return [("train.decay", train.decay, 1 <= train.decay <= left, f"from 1 to {left} with wsd, such as {fifth}")]
    falls = train.schedule == "cosine" or train.min_lr == 0
    return [
        ("train.decay", train.decay, train.decay == 0, f"0: train.schedule={train.schedule} has no decay of its own"),
        ("train.min_lr", train.min_lr, falls, "0: train.schedule=constant never falls"),
    ]
