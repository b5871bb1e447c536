"""Nemotron-3-Nano as a NeMo 2 model: configuration, packed batches, loss over the supervised tokens.

NeMo's own `MambaModel` never passes document boundaries on; here every batch is packed and its `cu_seqlens` reach
attention and the Mamba mixer, which resets convolution and state at each document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.mamba import MambaModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from nemo.collections.llm.gpt.model.base import GPTModel  # noqa: E402
from nemo.collections.llm.gpt.model.ssm import SSMConfig  # noqa: E402
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction  # noqa: E402

from nano3 import compat  # noqa: E402
from nano3.arch import Arch  # noqa: E402
from nano3.core import build_mcore_model, transformer_kwargs  # noqa: E402

compat.install()

Batch = dict[str, torch.Tensor]


def packed_data_step(dataloader_iter: Iterator) -> Batch:
    """Takes one packed micro batch; every pipeline stage gets the document boundaries.

    Returns tensors on the current device: tokens, labels, loss_mask, position_ids (1, s), cu_seqlens (documents + 1,)
    and the host integer max_seqlen.
    """
    item = next(dataloader_iter)
    batch = item[0] if isinstance(item, tuple) else item
    return {key: value.cuda(non_blocking=True) if key != "max_seqlen" else value for key, value in batch.items()}


def packed_seq_params(batch: Batch) -> PackedSeqParams:
    """Document boundaries of a packed batch, as Transformer Engine and the Mamba mixer take them."""
    boundaries, longest = batch["cu_seqlens"], int(batch["max_seqlen"])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def packed_forward_step(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Per-token losses (1, s) on the last pipeline stage, hidden states on the others."""
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=packed_seq_params(batch),
    )


@dataclass
class Nano3Config(SSMConfig):
    """NeMo's SSM configuration with a vocabulary of its own: the model's rows, not what a tokenizer happens to say."""

    vocab_size: int = 0

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MambaModel:
        """This rank's part of the model. The tokenizer has no say in the number of vocabulary rows."""
        del tokenizer
        if vp_stage is not None or self.virtual_pipeline_model_parallel_size is not None:
            raise ValueError("Megatron-Core's hybrid stack has no virtual pipeline; leave it unset")
        first = parallel_state.is_pipeline_first_stage() if pre_process is None else pre_process
        last = parallel_state.is_pipeline_last_stage() if post_process is None else post_process
        return build_mcore_model(
            self, self.hybrid_override_pattern, self.vocab_size, self.seq_length, pre_process=first, post_process=last
        )


class ValidationLoss(MaskedTokenLossReduction):
    """Adds up loss and supervised tokens over a whole validation: its mean is over tokens, not over batches."""

    def __init__(self) -> None:
        super().__init__(validation_step=True)
        self.total = torch.zeros(2)

    def reduce(self, losses_reduced_per_micro_batch: Any) -> torch.Tensor:
        for micro_batch in losses_reduced_per_micro_batch or ():
            self.total += micro_batch["loss_sum_and_ub_size"].to(self.total)
        return super().reduce(losses_reduced_per_micro_batch)

    def take(self) -> float:
        """Mean loss per supervised token since the last call, over all ranks; every rank must call it."""
        total, self.total = self.total.double().cuda(), torch.zeros(2)
        for group in (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),  # all but the last stage add nothing
        ):
            torch.distributed.all_reduce(total, group=group)
        return float(total[0] / total[1])


class Nano3Model(GPTModel):
    """NeMo's GPT training machinery around Megatron-Core's Mamba hybrid."""

    @property
    def validation_loss_reduction(self) -> ValidationLoss:
        """NeMo's, with sums over the whole validation."""
        if self._validation_loss_reduction is None:  # type: ignore[has-type]  # GPTModel.__init__ sets it
            self._validation_loss_reduction = ValidationLoss()
        return self._validation_loss_reduction

    def on_validation_epoch_end(self) -> None:
        """Logs `validation_loss`. NeMo's own `val_loss` is the mean of the batches' means."""
        self.log("validation_loss", self.validation_loss_reduction.take())


def nano3_config(arch: Arch, seq_length: int, bf16: bool) -> Nano3Config:
    """The configuration for `arch`, BF16 or FP32; gradients are divided by the global batch's supervised tokens."""
    return Nano3Config(
        **transformer_kwargs(arch),
        hybrid_override_pattern=arch.pattern,
        vocab_size=arch.vocab_size,
        seq_length=seq_length,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        cross_entropy_loss_fusion=not cpu.enabled(),
        attention_backend=AttnBackend.auto,  # NeMo's default insists on flash-attn, which not every environment has
        calculate_per_token_loss=True,
        forward_step_fn=packed_forward_step,
        data_step_fn=packed_data_step,
    )


def nano3_model(folder: str, seq_length: int, bf16: bool) -> Nano3Model:
    """The model that the config.json in `folder` describes, without weights (they come from the checkpoint)."""
    return Nano3Model(nano3_config(Arch.load(Path(folder)), seq_length, bf16))
