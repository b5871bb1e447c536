"""What a sweep tries: settings with their choices or ranges, and where the next trial lies among them.

    --try lora.rank=8,16,32            one of these
    --try train.lr=1e-5..1e-3:log      anything between, evenly in the logarithm
    --try train.warmup=0..40           anything between; whole numbers where the setting is one

A proposal follows from the seed, the trial's number and the trials that have ended, and from nothing else. So a sweep
that was killed proposes what it would have proposed. Imports neither torch nor NeMo, and Optuna only when it draws.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nano3.cli import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

SAMPLERS = ("tpe", "random")
"""Optuna's tree of Parzen estimators, whose first ten trials are random; or random throughout."""
DRAWS = 200
"""Draws for a point that no trial has had before the space counts as used up."""
_SPAN = re.compile(r"([^.:|,]+(?:\.\d+)?[^.:|,]*)\.\.([^:|,]+?)(:log)?")


def read_tries(words: Sequence[str]) -> dict[str, str]:
    """`["lora.rank=8,16"]` -> {"lora.rank": "8,16"}. Raises `UserError` for what is no such pair, or comes twice."""
    tries: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or not text:
            raise UserError(f"--try {word}: write KEY=8,16,32 or KEY=1e-5..1e-3:log")
        if key in tries:
            raise UserError(f"--try {key} is given twice; keep one of them")
        tries[key] = text
    return tries


def distributions(tries: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each setting; `settings` has their values now, which say what is a whole number.

    Raises:
        UserError: a range that has no numbers in it.
    """
    return {key: _distribution(key, text, settings.get(key)) for key, text in tries.items()}


def _distribution(key: str, text: str, now: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    span = _SPAN.fullmatch(text)
    if span is None:
        choices = text.split("|" if "|" in text else ",")
        if len(set(choices)) < len(choices):
            raise UserError(f"--try {key}={text} says a choice twice; keep one of them")
        return CategoricalDistribution(choices)
    log, whole = span[3] is not None, isinstance(now, int) and not isinstance(now, bool)
    try:
        low, high = (int(end) if whole else float(end) for end in (span[1], span[2]))
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        raise UserError(f"--try {key}={text}: the ends of a range must be {kind}") from None
    if not (low < high and math.isfinite(low) and math.isfinite(high)) or (log and low <= 0):
        raise UserError(f"--try {key}={text}: write LOW..HIGH, LOW below HIGH{', and above 0 for :log' if log else ''}")
    return IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)


def ends(space: Mapping[str, BaseDistribution]) -> list[dict[str, str]]:
    """Every choice and both ends of every range, each alone: what must be allowed before anything runs."""
    found = []
    for key, one in space.items():
        values = getattr(one, "choices", None) or (one.low, one.high)  # type: ignore[attr-defined]
        found += [{key: as_text(value)} for value in values]
    return found


def as_text(value: Any) -> str:
    """A value as the command line takes it, every bit of it."""
    return repr(value) if isinstance(value, float) else str(value)


def words_of(params: Mapping[str, Any]) -> str:
    """A trial's settings as the command line takes them."""
    return " ".join(f"{key}={as_text(value)}" for key, value in params.items())


def draw(
    space: dict[str, BaseDistribution], sampler: str, seed: int, number: int, trials: Sequence[FrozenTrial]
) -> dict[str, Any]:
    """The settings of trial `number`, of which `trials` is what the sweep has so far; no trial has had them.

    Raises:
        UserError: the space has no other point, or none that so many draws find.
    """
    import optuna

    make = optuna.samplers.TPESampler if sampler == "tpe" else optuna.samplers.RandomSampler
    ended = [one for one in trials if one.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)]
    for attempt in range(DRAWS):
        memory = optuna.create_study(sampler=make(seed=_seed(seed, number, attempt)))
        memory.add_trials(ended)
        params = memory.ask(space).params
        if params not in [one.params for one in trials]:
            return params
    raise UserError(f"the space has no point left for trial {number}: widen a --try, or give fewer --trials")


def _seed(*numbers: int) -> int:
    """A seed of 32 bits that differs where any of the numbers does."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
