"""`adapter_config.json` of a Hugging Face PEFT adapter: read, and refused where we would misread it. Torch-free.

What decides an adapter's values is used (`r`, `lora_alpha`, the two patterns, `use_rslora`, `use_dora`,
`target_parameters`); what only decided how it was trained, or how PEFT finds its modules, is passed over, since the
tensors' names say where they belong. Any other field must be as PEFT sets it when nobody asks for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.adapters.peft_names import CONFIG
from nano3.cli import UserError

_PASSED_OVER = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("lora_dropout", "megatron_core", "runtime_config", "qalora_group_size", "eva_config"),
}
_USED = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_parameters"),
    "init_lora_weights",
}
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga) train
against a base from which something was taken away."""


@dataclass(frozen=True)
class PeftConfig:
    """What the file says, as far as it decides the adapter's values."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    target_parameters: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of a module, named as in the model that PEFT wrapped."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)

    def alpha_of(self, module: str) -> float:
        """Its alpha, likewise."""
        return self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)

    def scale_of(self, module: str) -> float:
        """What its B @ A is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, parameter: str) -> bool:
        """Whether `target_parameters` names a parameter of the model."""
        return any(parameter == target or parameter.endswith(f".{target}") for target in self.target_parameters)


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first key that matches the whole name or a tail of it behind a dot: PEFT's `get_pattern_key`."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads the file. Raises `UserError` naming the field that is missing, wrong, or of a kind that we do not read."""
    where = folder / CONFIG
    try:
        raw = json.loads(where.read_text())
        fields = dict(raw)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{where} is not readable ({error}); copy the adapter again") from None
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {fields.get('peft_type')!r} is not LORA, the only kind that we read")
    for name, value in fields.items():
        if name not in _PASSED_OVER | _USED and value not in (None, False, "none", [], {}):
            raise UserError(f"{where}: {name}={value!r} makes it an adapter of a kind that we do not read")
    if fields.get("init_lora_weights", True) not in _STARTS:
        raise UserError(
            f"{where}: init_lora_weights={fields['init_lora_weights']!r} goes with a changed base; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion"
        )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    if not (isinstance(ranks, dict) and isinstance(alphas, dict)):
        raise UserError(f"{where}: rank_pattern and alpha_pattern are not tables of names; copy the adapter again")
    for name, value in {"r": rank, **ranks}.items():
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise UserError(f"{where}: the rank of {name} is {value!r}, not a positive whole number")
    for name, value in {"lora_alpha": alpha, **alphas}.items():
        if not (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0):
            raise UserError(f"{where}: the alpha of {name} is {value!r}, not a positive number")
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{where}: the pattern {pattern!r} is no regular expression ({error})") from None
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    return PeftConfig(
        rank=rank,
        alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rslora=bool(fields.get("use_rslora")),
        dora=bool(fields.get("use_dora")),
        target_parameters=tuple(fields.get("target_parameters") or ()),
    )
