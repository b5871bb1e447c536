"""The model in Megatron-Core: its configuration from an `Arch`, and the stock Mamba hybrid stack. No NeMo.

Call `nano3.cpu.enable()` before importing this module where there may be no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from nano3 import cpu
from nano3.arch import Arch, padded_vocab_size
from nano3.cli import UserError
from nano3.kept_dtypes import keep_dtype

MAMBA_CONV_KERNEL = 4
"""Width of the causal convolution, `d_conv` of Megatron-Core's MambaMixer."""

FP32_TENSORS: dict[type[torch.nn.Module], tuple[str, ...]] = {
    MambaMixer: ("A_log", "D"),
    TopKRouter: ("expert_bias", "local_tokens_per_expert"),
}
"""Parameters and buffers that stay FP32, by the module that owns them: those that the published checkpoint holds in
FP32, and the counts of tokens that move the correction bias, which BF16 would round from 257 on."""


def transformer_kwargs(arch: Arch) -> dict[str, Any]:
    """Fields of Megatron-Core's `TransformerConfig` that the architecture decides, and those that keep it exact.

    Router, activation and normalization follow the model's definition. Auxiliary and z losses are off: with a frozen
    router they would reach the adapters through the hidden states and depend on how documents are packed.
    The convolution's width and the scan's chunk are defaults of Megatron-Core's mixer, not configuration: another width
    is refused, another chunk changes nothing but rounding.
    """
    if arch.conv_kernel != MAMBA_CONV_KERNEL:
        raise UserError(
            f"conv_kernel {arch.conv_kernel}: Megatron-Core's Mamba mixer is built with {MAMBA_CONV_KERNEL}"
        )
    return {
        "num_layers": len(arch.layers),
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "ffn_hidden_size": arch.intermediate_size,
        "mamba_state_dim": arch.ssm_state_size,
        "mamba_head_dim": arch.mamba_head_dim,
        "mamba_num_groups": arch.n_groups,
        "mamba_num_heads": arch.mamba_num_heads,
        "is_hybrid_model": True,
        "activation_func": squared_relu,
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.layer_norm_epsilon,
        "init_method_std": arch.initializer_range,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_router_bias_update_rate": 0.0,
        **(_expert_kwargs(arch) if arch.moe_layers else {}),
        **_fusions(),
    }


def _expert_kwargs(arch: Arch) -> dict[str, Any]:
    """Fields of the mixture of experts, which a dense model must not have: `moe_grouped_gemm` alone needs experts."""
    return {
        "num_moe_experts": arch.n_routed_experts,
        "moe_router_topk": arch.num_experts_per_tok,
        "moe_ffn_hidden_size": arch.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": arch.moe_shared_expert_intermediate_size,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": arch.routed_scaling_factor,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
    }


def _fusions() -> dict[str, Any]:
    """Fused kernels: all that help on GPUs, none on the CPU backend, which has only the plain ones."""
    on_gpu = not cpu.enabled()
    return {
        "apply_rope_fusion": False,  # the model has no rotary embedding at all
        "masked_softmax_fusion": False,  # attention runs in Transformer Engine, which masks itself
        "persist_layer_norm": False,
        "bias_dropout_fusion": on_gpu,
        "gradient_accumulation_fusion": False,  # base weights are frozen: there are no large gradients to accumulate
        "moe_permute_fusion": on_gpu,
        # Keeps one of the experts' wide tensors less, on CPUs too; without CUDA its kernel is nano3/cpu/megatron.py's.
        "use_fused_weighted_squared_relu": True,
    }


def mask_padded_vocabulary(model: MambaModel, vocab_size: int) -> None:
    """Gives padded vocabulary rows no probability.

    Their weights are zero, hence their logits too, and a softmax over them would take probability from real
    tokens. A hook on the output layer sets their logits to the dtype's lowest value, on whichever tensor-parallel
    rank they are.
    """
    if not model.post_process or model.vocab_size == vocab_size:
        return
    layer = model.output_layer
    local = layer.weight.shape[0]
    first = layer.tp_group.rank() * local

    def hook(_module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        real = vocab_size - first if logits.shape[-1] == local else vocab_size
        return _MaskedFrom.apply(logits, min(max(real, 0), logits.shape[-1])), bias

    layer.register_forward_hook(hook)


class _MaskedFrom(torch.autograd.Function):
    """Sets the logits from column `real` on to their dtype's lowest value, in place: no pass over all of them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, real: int) -> torch.Tensor:
        logits[..., real:] = torch.finfo(logits.dtype).min
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        del ctx
        return grads[0], None  # a softmax gives those columns the probability 0 and with it the gradient 0, exactly


def keep_fp32_exact(model: MambaModel) -> None:
    """Keeps what the checkpoint has in FP32 in FP32, bit for bit, when the model is cast (see `FP32_TENSORS`).

    Mixed precision casts a whole model to BF16, buffers too. Megatron-Core turns the router's bias back to FP32
    afterwards, but rounded, and leaves A_log and D in BF16: training would then run another model than the checkpoint
    that the adapter is merged into.
    """
    for module in model.modules():
        for kind, names in FP32_TENSORS.items():
            if isinstance(module, kind):
                keep_dtype(module, names)


def packed_seq_params(batch: dict[str, torch.Tensor], context_parallel: int) -> PackedSeqParams:
    """Document boundaries of the whole pack, as Transformer Engine and the Mamba mixer take them.

    Under context parallelism Transformer Engine insists on the boundaries with padding too. Ours are the same, as
    padding belongs to its document; without it they are left out, since it would compare the two in every layer.
    """
    boundaries, longest = batch["cu_seqlens"], int(batch["max_seqlen"])
    padded = boundaries if context_parallel > 1 else None
    return PackedSeqParams("thd", boundaries, boundaries, padded, padded, max_seqlen_q=longest, max_seqlen_kv=longest)


def build_mcore_model(
    config: TransformerConfig,
    pattern: str,
    vocab_size: int,
    max_sequence_length: int,
    pre_process: bool = True,
    post_process: bool = True,
) -> MambaModel:
    """Megatron-Core's `MambaModel` on its stock `mamba_stack_spec`, this pipeline stage of it."""
    model = MambaModel(
        config,
        mamba_stack_spec=mamba_stack_spec,
        vocab_size=padded_vocab_size(vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=max_sequence_length,
        hybrid_override_pattern=pattern,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="none",
    )
    mask_padded_vocabulary(model, vocab_size)
    keep_fp32_exact(model)
    return model
