"""Nemotron-3-Nano as a NeMo 2 model: configuration, packed batches, loss over the supervised tokens.

NeMo's own `MambaModel` never passes document boundaries on; here every batch is packed and its `cu_seqlens` reach
attention and the Mamba mixer, which resets convolution and state at each document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.mamba import MambaModel  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from nemo.collections.llm.gpt.model.base import GPTModel  # noqa: E402
from nemo.collections.llm.gpt.model.ssm import SSMConfig  # noqa: E402

from nano3 import checkpoint_metadata, compat  # noqa: E402
from nano3.arch import Arch  # noqa: E402
from nano3.chunked_loss import install_chunked_loss  # noqa: E402
from nano3.context_parallel import cut_batch  # noqa: E402
from nano3.core import build_mcore_model, packed_seq_params, transformer_kwargs  # noqa: E402
from nano3.etp_replicas import then_equal_copies  # noqa: E402
from nano3.gate import Gate  # noqa: E402
from nano3.loss import TokenLoss, WeightedFinish, accuracy, judges, mean_loss, mean_losses, record_verdicts  # noqa: E402
from nano3.nf4_base import build_on_meta  # noqa: E402
from nano3.recompute import install_recompute, recompute_kwargs  # noqa: E402
from nano3.router import BALANCE_RATE, count_documents_only  # noqa: E402
from nano3.stage_weights import NAMES, StageWeights  # noqa: E402

compat.install()
checkpoint_metadata.guard()

Batch = dict[str, torch.Tensor]
UNREAD = ("val_loss", "lr", "step", "global_step")
"""What NeMo logs and we do not show: `val_loss` is the mean of the batches' means, which depends on the batch size, and
the others are in our rows already. Each costs Lightning half a millisecond a step."""


def packed_data_step(dataloader_iter: Iterator) -> Batch:
    """Takes one packed micro batch; every pipeline stage gets the document boundaries.

    Returns tensors on the current device: tokens, labels, loss_mask, position_ids, source, stage, gate (1, s / cp),
    this rank's share of every document; cu_seqlens (documents + 1,) of the whole pack and the host integer max_seqlen.
    """
    item = next(dataloader_iter)
    batch = cut_batch(
        item[0] if isinstance(item, tuple) else item,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    return {key: value.cuda(non_blocking=True) if key != "max_seqlen" else value for key, value in batch.items()}


def packed_forward_step(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Per-token losses (1, s) on the last pipeline stage, hidden states on the others.

    Where the model judges its labels (`nano3.loss.judges`), the last stage's batch gets `correct`, (1, s) bool.
    """
    core = next(module for module in model.modules() if isinstance(module, MambaModel))
    balanced = core.config.moe_router_bias_update_rate > 0
    forward = partial(
        model,
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=packed_seq_params(batch, core.config.context_parallel_size),
        **({"padding_mask": batch["source"] < 0} if balanced else {}),
    )
    gate: Gate | None = getattr(core, "gate", None)
    output = forward() if gate is None else gate.through(batch["gate"], forward)
    if core.post_process and judges(core):
        batch["correct"] = torch.cat(core.verdicts, 1)
    return output


@dataclass
class Nano3Config(SSMConfig):
    """NeMo's SSM configuration with a vocabulary of its own: the model's rows, not what a tokenizer happens to say."""

    vocab_size: int = 0
    recompute: list[str] = field(default_factory=list)
    """What the backward pass computes again (`nano3.recompute`)."""
    loss_chunk: int = 0
    """Positions whose logits exist at a time (`nano3.chunked_loss`); 0: all."""
    load_base: Callable[[MambaModel], None] | None = None
    """Gives the model, whose linear layers have no memory yet, its weights (`nano3.nf4_base`). None: it is built with
    memory, and the weights come from a checkpoint."""

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
        build = partial(
            build_mcore_model,
            self,
            self.hybrid_override_pattern,
            self.vocab_size,
            self.seq_length,
            pre_process=first,
            post_process=last,
        )
        if self.load_base is None:
            model = build()
        else:
            model = build_on_meta(self, build)
            self.load_base(model)
        install_recompute(model, self.recompute)
        install_chunked_loss(model, self.loss_chunk)
        record_verdicts(model)
        if self.moe_router_bias_update_rate:
            count_documents_only(model)
        return model


class Nano3Model(GPTModel):
    """NeMo's GPT training machinery around Megatron-Core's Mamba hybrid.

    The trainer's data module says which sources the data has: `train_sources` and `validation_sources`, lists of names.
    """

    stage_weights: StageWeights | None = None
    """Weights by stage in the training loss, where a callback sets them (`nano3/training/stage_weighting.py`)."""

    @property
    def training_loss_reduction(self) -> TokenLoss:
        """Our loss in place of NeMo's."""
        if self._training_loss_reduction is None:  # type: ignore[has-type]  # GPTModel.__init__ sets it
            sources = len(self.trainer.datamodule.train_sources)
            self._training_loss_reduction = TokenLoss(sources, validation=False, stages=self.stage_weights)
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> TokenLoss:
        """The same, with sums over the whole validation."""
        if self._validation_loss_reduction is None:  # type: ignore[has-type]
            self._validation_loss_reduction = TokenLoss(
                len(self.trainer.datamodule.validation_sources), validation=True
            )
        return self._validation_loss_reduction

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Megatron-Core's model with these inputs; NeMo's own method passes no padding mask on."""
        return self.module(**inputs)

    def on_train_batch_start(self, *_: Any) -> None:
        """Puts `WeightedFinish` before the function that NeMo gave the model when the first epoch started."""
        finalize = self.config.finalize_model_grads_func
        if not isinstance(finalize, WeightedFinish):
            if self.stage_weights is not None and self.stage_weights.dynamic:
                next(part for part in self.modules() if isinstance(part, MambaModel)).judge_training = True
            loss = self.training_loss_reduction
            self.config.finalize_model_grads_func = WeightedFinish(then_equal_copies(finalize), loss, self._log_sources)

    def _log_sources(self, table: torch.Tensor) -> None:
        """Logs `loss/SOURCE`; NaN for a source that the global batch has nothing of."""
        for name, loss in zip(self.trainer.datamodule.train_sources, mean_losses(table), strict=True):
            self.log(f"loss/{name}", loss, batch_size=1)
        if self.stage_weights is not None:
            losses, values = mean_losses(self.training_loss_reduction.by_stage), self.stage_weights.weights.tolist()
            for name, loss, weight in zip(NAMES, losses, values, strict=True):
                self.log(f"stage_loss/{name}", loss, batch_size=1)
                self.log(f"stage_weight/{name}", weight, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Logs `validation_loss`, `validation_accuracy` and `validation_loss/SOURCE`, over the whole set."""
        table = self.validation_loss_reduction.finish()
        self.log("validation_loss", mean_loss(table))
        self.log("validation_accuracy", accuracy(table))
        for name, loss in zip(self.trainer.datamodule.validation_sources, mean_losses(table), strict=True):
            self.log(f"validation_loss/{name}", loss)

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Lightning's, without what NeMo logs and nobody reads (`UNREAD`)."""
        if name not in UNREAD:
            super().log(name, *args, **kwargs)


def nano3_config(
    arch: Arch,
    seq_length: int,
    bf16: bool,
    router: str = "frozen",
    recompute: Sequence[str] = (),
    load_base: Callable[[MambaModel], None] | None = None,
    loss_chunk: int = 0,
    **layout: Any,
) -> Nano3Config:
    """The configuration for `arch`, BF16 or FP32, with a `frozen` router or one that goes on to `balance`.

    `recompute`: what the backward pass computes again (`nano3.recompute`). `load_base`, `loss_chunk`: see
    `Nano3Config`. `layout`: Megatron-Core's parallel sizes, for who builds the model without NeMo's strategy.
    """
    bias_rate = BALANCE_RATE if router == "balance" else 0.0
    return Nano3Config(
        **{**transformer_kwargs(arch), "moe_router_bias_update_rate": bias_rate},
        **recompute_kwargs(recompute),
        recompute=list(recompute),
        load_base=load_base,
        loss_chunk=loss_chunk,
        **layout,
        hybrid_override_pattern=arch.pattern,
        vocab_size=arch.vocab_size,
        seq_length=seq_length,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        cross_entropy_loss_fusion=False,  # on a GPU too: the unfused loss is the one that CPU ranks prove
        attention_backend=AttnBackend.auto,  # NeMo's default insists on flash-attn, which not every environment has
        calculate_per_token_loss=True,  # gradients are sums, which `WeightedFinish` divides
        forward_step_fn=packed_forward_step,
        data_step_fn=packed_data_step,
    )


def nano3_model(
    folder: str,
    seq_length: int,
    bf16: bool,
    router: str = "frozen",
    recompute: Sequence[str] = (),
    load_base: Callable[[MambaModel], None] | None = None,
    loss_chunk: int = 0,
) -> Nano3Model:
    """The model that the config.json in `folder` describes; without `load_base` its weights come from a checkpoint."""
    config = nano3_config(Arch.load(Path(folder)), seq_length, bf16, router, recompute, load_base, loss_chunk)
    return Nano3Model(config)
