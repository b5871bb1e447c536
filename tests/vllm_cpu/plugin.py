"""A plug-in for vLLM (entry point group `vllm.general_plugins`) that runs Nemotron-H's routed experts on a CPU.

vLLM 0.32 refuses experts without a gate there (`FusedMoEConfig.__post_init__`), and has no CPU kernel for FP8 experts
with one scale a matrix. `register` lifts the refusal and gives both to `tests.vllm_cpu.products`. Routing, shared
experts, loading, scales and everything else stay vLLM's own. Runs in the environment of `make check-vllm` only.
"""

from __future__ import annotations

from functools import wraps
from importlib.metadata import version
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as experts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

from tests.vllm_cpu.products import Adapters, Matrices, relu2_experts

SCHEMES = ((None, None), (kFp8StaticTensorSym, kFp8StaticTensorSym))
"""Kinds of weights and inputs: unquantized, and E4M3 with one static scale each."""


class PlainExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
    """vLLM's class of experts, with our products in place of its kernels."""

    @staticmethod
    def is_supported_config(cls: Any, *arguments: Any) -> tuple[bool, str | None]:
        return mk.FusedMoEExperts.is_supported_config(cls, *arguments)

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation == MoEActivation.RELU2_NO_MUL

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) in SCHEMES

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: the products take the weights as they are."""

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        """Writes the experts' weighted sum, (tokens, hidden), into `output`."""
        found, up, down, slots = self._lora_context, None, None, None
        if found is not None:
            up = Adapters(found.w13_lora_a_stacked[0], found.w13_lora_b_stacked[0])
            down = Adapters(found.w2_lora_a_stacked[0], found.w2_lora_b_stacked[0])
            slots = found.punica_wrapper.token_lora_indices[: len(hidden_states)]
        first = Matrices(w1, self.w1_scale, self.a1_scale, up)
        second = Matrices(w2, self.w2_scale, self.a2_scale, down)
        output.copy_(relu2_experts(hidden_states, first, second, topk_weights, topk_ids, slots))


def _chosen(backend: Any, config: Any, weight_key: Any = None, activation_key: Any = None) -> tuple[Any, Any]:
    """What vLLM's choice of a kernel returns. Raises `NotImplementedError` for experts that ours are not made for."""
    form = mk.FusedMoEActivationFormat.Standard
    supported, reason = PlainExperts.is_supported_config(PlainExperts, config, weight_key, activation_key, form)
    if not supported:
        raise NotImplementedError(reason)
    return backend, PlainExperts


def register() -> None:
    """Puts the class where vLLM chooses one. Called by vLLM in each of its processes, and harmless twice.

    Raises `RuntimeError` for another vLLM than the one that this was read from.
    """
    if not version("vllm-cpu").startswith("0.32."):
        raise RuntimeError(f"vllm-cpu {version('vllm-cpu')}: this plug-in was written for 0.32; read its sources again")
    if getattr(FusedMoEConfig.__post_init__, "lifted", False):
        return
    refusing = FusedMoEConfig.__post_init__

    @wraps(refusing)
    def lifted(self: Any) -> None:
        try:
            refusing(self)  # the refusal is its last statement
        except NotImplementedError as refusal:
            if "is_act_and_mul=False" not in str(refusal):
                raise

    lifted.lifted = True  # type: ignore[attr-defined]
    FusedMoEConfig.__post_init__ = lifted
    experts.select_unquantized_moe_backend = lambda moe_config: _chosen(UnquantizedMoeBackend.CPU, moe_config)
    # This backend neither packs the codes nor drops the scale of an input.
    modelopt.select_fp8_moe_backend = lambda config, **keys: _chosen(Fp8MoeBackend.TRITON, config, **keys)
    # In FP32 a difference is one of reading, and not of rounding to BF16. vLLM's list is for its GPU kernels.
    modelopt.ModelOptFp8Config.get_supported_act_dtypes = lambda _self: [torch.bfloat16, torch.float16, torch.float32]
