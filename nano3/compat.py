"""The seam between nemo-toolkit 2.7.3 and megatron-core 0.16.1, in one place.

2.7.3 is the last NeMo with LLM recipes and was released against an older Megatron-Core; 0.16 is the first whose Mamba
hybrid stack has mixture-of-experts layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Condition = Callable[[str, Any], bool]
"""(parameter name, parameter) -> whether it is meant."""


def with_conditions(get_optimizer: Callable) -> Callable:
    """Megatron-Core's optimizer factory, called as NeMo calls it.

    NeMo passes `no_weight_decay_cond`, `scale_lr_cond` and `lr_mult`, which megatron-core 0.16 replaced by overrides of
    parameter groups: no weight decay where the first holds, `lr_mult` times the learning rate where the second does.
    """

    @functools.wraps(get_optimizer)
    def wrapped(
        config: Any,
        model_chunks: Any,
        *,
        no_weight_decay_cond: Condition | None = None,
        scale_lr_cond: Condition | None = None,
        lr_mult: float = 1.0,
        **settings: Any,
    ) -> Any:
        overrides = {}
        if no_weight_decay_cond is not None:
            overrides[_group(no_weight_decay_cond)] = {"wd_mult": 0.0}
        if scale_lr_cond is not None:
            overrides[_group(scale_lr_cond)] = {"max_lr": config.lr * lr_mult}
        elif lr_mult != 1.0:
            raise TypeError(f"lr_mult={lr_mult} without scale_lr_cond would change nothing")
        if overrides:
            settings["config_overrides"] = overrides
        return get_optimizer(config, model_chunks, **settings)

    return wrapped


def _group(condition: Condition) -> Any:
    """The key of a parameter group; Megatron-Core asks with the arguments the other way round."""
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    predicate = ParamWithNamePredicate(condition.__name__, lambda parameter, name: condition(name, parameter))
    return ParamKey(with_name_predicate=predicate)


def install() -> None:
    """Lets NeMo make Megatron-Core's optimizer."""
    from megatron.core import optimizer

    if not hasattr(optimizer.get_megatron_optimizer, "__wrapped__"):
        optimizer.get_megatron_optimizer = with_conditions(optimizer.get_megatron_optimizer)
