"""`adapter_config.json` of a Hugging Face PEFT adapter: read, and refused where we would misread it. Torch-free.

What decides an adapter's values is used (`r`, `lora_alpha`, the two patterns, `use_rslora`, `use_dora`,
`target_parameters`); what only decided how it was trained, or how PEFT finds its modules, is passed over, since the
tensors' names say where they belong. Any other field must be as PEFT sets it when nobody asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, Le, MaxLen
from typing_extensions import TypedDict

from conversion.adapters.peft_names import CONFIG
from nano3.cli import UserError
from nano3.documents import AboveZero, Name, check, read_json, shown
from nano3.patterns import MAX_PATTERN, Pattern

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


_REMEDY = "copy the adapter again"
_Rank = Annotated[int, Ge(1), Le(1 << 16)]
_Key = Annotated[str, MaxLen(MAX_PATTERN - 20)]
"""A key of a table of patterns, to which PEFT adds what lets it match a tail."""


class PeftFields(TypedDict):
    """adapter_config.json, as far as it decides values. PEFT writes null for what nobody asked for."""

    r: _Rank
    lora_alpha: AboveZero
    rank_pattern: NotRequired[Annotated[dict[_Key, _Rank], MaxLen(100_000)] | None]
    alpha_pattern: NotRequired[Annotated[dict[_Key, AboveZero], MaxLen(100_000)] | None]
    use_rslora: NotRequired[bool | None]
    use_dora: NotRequired[bool | None]
    target_parameters: NotRequired[list[Name] | None]


@dataclass(frozen=True)
class PeftConfig:
    """What the file says, as far as it decides the adapter's values."""

    rank: int
    alpha: float
    rank_pattern: _Patterns
    alpha_pattern: _Patterns
    rslora: bool
    dora: bool
    target_parameters: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of a module, named as in the model that PEFT wrapped."""
        return self.rank_pattern.get(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Its alpha, likewise."""
        return self.alpha_pattern.get(module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What its B @ A is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, parameter: str) -> bool:
        """Whether `target_parameters` names a parameter of the model."""
        return any(parameter == target or parameter.endswith(f".{target}") for target in self.target_parameters)


class _Patterns:
    """A table from pattern to value: the first key that matches a module's whole name, or a tail of it behind a dot
    (PEFT's `get_pattern_key`), gives its value; so does the name itself."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self._values = [(Pattern(rf"(.*\.)?({key})$", where), value) for key, value in table.items()]

    def get(self, module: str, default: Any) -> Any:
        """The value of a module."""
        return next((value for pattern, value in self._values if pattern.begins(module)), default)


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads the file. Raises `UserError` naming the field that is missing, wrong, or of a kind that we do not read."""
    where = folder / CONFIG
    fields = read_json(where, dict[str, Any], _REMEDY)
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {shown(fields.get('peft_type'))} is not LORA, the only kind that we read")
    for name, value in fields.items():
        if name not in _PASSED_OVER | _USED and value not in (None, False, "none", [], {}):
            raise UserError(f"{where}: {name}={shown(value)} makes it an adapter of a kind that we do not read")
    if fields.get("init_lora_weights", True) not in _STARTS:
        raise UserError(
            f"{where}: init_lora_weights={shown(fields['init_lora_weights'])} goes with a changed base; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    check(fields, PeftFields, str(where), _REMEDY)
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    return PeftConfig(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        rank_pattern=_Patterns(ranks, str(where)),
        alpha_pattern=_Patterns(alphas, str(where)),
        rslora=bool(fields.get("use_rslora")),
        dora=bool(fields.get("use_dora")),
        target_parameters=tuple(fields.get("target_parameters") or ()),
    )
