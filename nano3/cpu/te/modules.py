"""Puts the stand-ins where `import transformer_engine` finds them."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nano3.cpu.standin import put_module
from nano3.cpu.te import VERSION
from nano3.cpu.te.attention import DotProductAttention
from nano3.cpu.te.base import TransformerEngineBaseModule
from nano3.cpu.te.linear import GroupedLinear, LayerNormLinear, Linear
from nano3.cpu.te.norm import RMSNorm
from nano3.cpu.te.partition import partitioned_indices


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """There is no FP8 arithmetic here, so asking for it is an error; off, it does nothing."""
    del fp8_recipe, fp8_group, _graph
    if enabled or calibrating:
        raise NotImplementedError("FP8 training needs Transformer Engine on a GPU; the CPU path has BF16 and FP32")
    yield


@contextlib.contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """See `fp8_autocast`."""
    del recipe, preserve_high_precision_init_val
    with fp8_autocast(enabled):
        yield


class FP8GlobalStateManager:
    """Answers Megatron-Core's questions about FP8: it is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def is_fp8_calibration() -> bool:
        return False


@contextlib.contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    """Around a recomputed forward Transformer Engine keeps FP8 scales; without FP8 there is nothing to keep."""
    del activation_recompute, recompute_phase
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    """See `activation_recompute_forward`."""
    return False


def _gpu_only(name: str) -> Callable:
    """A function that Megatron-Core imports by name and calls only for a fusion that is off on CPUs."""

    def refuse(*_args: Any, **_settings: Any) -> None:
        raise NotImplementedError(f"transformer_engine's {name} is a CUDA kernel; moe_router_fusion needs a GPU")

    refuse.__name__ = name
    return refuse


class CudaRNGStatesTracker:
    """Base of Megatron-Core's CUDA-graph-safe tracker; without graphs its own tracker is the one to use."""

    def __init__(self) -> None:
        raise NotImplementedError("use_te_rng_tracker is for CUDA graphs; the CPU backend uses Megatron-Core's tracker")


class QuantizedTensor:
    """Nothing is an instance of this on a CPU; Megatron-Core tests parameters against it."""


class _Recipe:
    """Base of the FP8 recipe classes, for `isinstance` tests only."""


class DelayedScaling(_Recipe):
    """See `_Recipe`."""


class Format:
    """FP8 formats by name, for configuration code that mentions them."""

    E4M3 = "E4M3"
    HYBRID = "HYBRID"


def install() -> None:
    """Registers `transformer_engine` and the submodules that Megatron-Core 0.16.1 and NeMo 2.7.3 import."""
    real_version = importlib.metadata.version

    def version(distribution_name: str) -> str:
        named = distribution_name.replace("_", "-")
        return VERSION if named == "transformer-engine" else real_version(distribution_name)

    importlib.metadata.version = version
    put_module("transformer_engine", __version__=VERSION)
    put_module("transformer_engine_torch", thd_get_partitioned_indices=partitioned_indices)
    put_module("transformer_engine.common")
    put_module("transformer_engine.common.recipe", Format=Format, Recipe=_Recipe, DelayedScaling=DelayedScaling)
    modules = {cls.__name__: cls for cls in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention)}
    put_module("transformer_engine.pytorch", **modules, fp8_autocast=fp8_autocast, fp8_model_init=fp8_model_init)
    put_module("transformer_engine.pytorch.ops", Sequential=torch.nn.Sequential, FusibleOperation=torch.nn.Module)
    put_module("transformer_engine.pytorch.tensor", QuantizedTensor=QuantizedTensor)
    put_module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast)
    put_module(
        "transformer_engine.pytorch.distributed",
        CudaRNGStatesTracker=CudaRNGStatesTracker,
        activation_recompute_forward=activation_recompute_forward,
        is_fp8_activation_recompute_enabled=is_fp8_activation_recompute_enabled,
    )
    router = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    put_module("transformer_engine.pytorch.router", **{name: _gpu_only(name) for name in router})
    put_module("transformer_engine.pytorch.module")
    put_module("transformer_engine.pytorch.module.base", TransformerEngineBaseModule=TransformerEngineBaseModule)
