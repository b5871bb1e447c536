"""What every Transformer Engine module here shares: no FP8, an empty `_extra_state`, refusal of what is not built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def refuse(module: str, **unsupported: bool) -> None:
    """Raises for each named feature whose value is true: a silent difference from the GPU would be worse."""
    for feature, asked in unsupported.items():
        if asked:
            raise NotImplementedError(f"the CPU stand-in of {module} has no {feature}; it exists on GPUs only")


class TransformerEngineBaseModule(torch.nn.Module):
    """Base of the stand-ins. `_extra_state` is the empty byte tensor that Transformer Engine writes without FP8.

    A checkpoint of an FP8 run has pickled scales there. Without FP8 they have no use (the weights beside them are
    whole), so they are put aside before anybody, Megatron-Core's grouped layers included, unpickles them.
    """

    fp8 = False
    fp8_calibration = False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}
        self.tp_group: Any = None
        self._register_load_state_dict_pre_hook(_put_fp8_state_aside)

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        """Sets the tensor-parallel group of a module that was built before the groups existed."""
        self.tp_group = tp_group

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        del state

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """FP8 state does not exist here; Megatron-Core calls this before it merges empty extra states."""
        if num_gemms < 1:
            raise ValueError(f"num_gemms must be positive, got {num_gemms}")


def _put_fp8_state_aside(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}_extra_state")]:
        state_dict[key] = torch.empty(0, dtype=torch.uint8)


def initialize(
    weight: torch.Tensor,
    init_method: Callable | None,
    get_rng_state_tracker: Callable | None,
    rng_tracker_name: str | None,
) -> None:
    """Fills `weight` under the tracker's generator, as Transformer Engine does (default: normal with std 0.023)."""
    method = init_method or (lambda tensor: torch.nn.init.normal_(tensor, mean=0.0, std=0.023))
    with torch.no_grad():
        if get_rng_state_tracker is None:
            method(weight)
            return
        tracker = get_rng_state_tracker()
        with tracker.fork(rng_tracker_name) if rng_tracker_name else tracker.fork():
            method(weight)
