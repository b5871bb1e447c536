"""The loss of a step: the weighted mean over the supervised tokens of the global batch, however they were grouped.

    loss = sum of weight * token loss / sum of weights,   over all packs of the step, of all ranks

A token's weight is its `loss_mask`, in training times that of its stage where stages have weights. Every micro batch
adds its sums to one small table with a row per source of the data; the table is reduced once per step, and all logged
losses come from it. Gradients are sums too, divided by the same sum of weights.

Call `nano3.cpu.enable()` before importing this module where there may be no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.mamba import MambaModel
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import nn

from nano3.stage_weights import NAMES, StageWeights

LOSS, WEIGHT, CORRECT, TOKENS = range(4)
"""Columns of the table: weighted loss, weights, supervised tokens predicted right (validation), supervised tokens."""


class TokenLoss(MegatronLossReduction):
    """Sums of one step, or of one validation, by source.

    Args:
        sources: rows of the table; `source` of a batch numbers them, and is negative for padding.
        validation: whether sums go on over many steps, and count the tokens predicted right.
        stages: weights by stage, of a batch with `stage`; their own rows stand behind those of the sources.
    """

    def __init__(self, sources: int, validation: bool, stages: StageWeights | None = None) -> None:
        super().__init__()
        self.validation, self.sources, self.stages = validation, sources, stages
        self.sums = torch.zeros(sources + (len(NAMES) if stages else 0), 4, dtype=torch.float64)
        self.reduced = self.by_stage = self.sums

    def forward(self, batch: Any, forward_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Losses (1, s) -> their weighted sum, the number of supervised tokens, and nothing more to keep.

        Megatron-Core adds the numbers of tokens up as integers; `WeightedFinish` divides by the weights instead.
        """
        losses = forward_out.view(-1)  # FP32, also of a BF16 model
        weights = batch["loss_mask"].view(-1).to(losses)
        supervised = weights > 0
        correct = batch["correct"].view(-1) & supervised if "correct" in batch else torch.zeros_like(supervised)
        self.sums = self.sums.to(losses.device)
        if self.stages is not None:
            stage = batch["stage"].view(-1).long().clamp(max=len(NAMES) - 1)
            self._add(self.sources + stage, losses, weights, correct, supervised)
            weights = weights * self.stages.weights.to(weights)[stage]
        self._add(batch["source"].view(-1).clamp(min=0), losses, weights, correct, supervised)
        return (losses * weights).sum(), supervised.sum().int(), {}

    def _add(self, rows: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor, *counts: torch.Tensor) -> None:
        """Adds every token (n,) to its row: its weighted loss, its weight, and what else is counted of it."""
        columns = [(losses * weights).detach(), weights, *counts]
        self.sums.index_add_(0, rows, torch.stack([column.double() for column in columns], 1))

    def finish(self) -> torch.Tensor:
        """The table over all ranks, (sources, 4) float64; starts a new one. Every rank must call it.

        `by_stage` is that of the stages, (7, 4), with the weights of the data alone; their weights move by it.
        """
        table, self.sums = self.sums.cuda(), torch.zeros_like(self.sums)
        for group in (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),  # all but the last stage add nothing
        ):
            if dist.get_world_size(group) > 1:
                dist.all_reduce(table, group=group)
        self.reduced, self.by_stage = table[: self.sources], table[self.sources :]
        if self.stages is not None:
            self.stages.update(self.by_stage[:, TOKENS], self.by_stage[:, CORRECT])
        return self.reduced

    def reduce(self, losses_reduced_per_micro_batch: Any) -> torch.Tensor:
        """The loss of the step that `finish` closed. NeMo calls this on the last pipeline stage."""
        del losses_reduced_per_micro_batch
        return mean_loss(self.reduced) if not self.validation else torch.zeros((), device=self.sums.device)


def mean_loss(table: torch.Tensor) -> torch.Tensor:
    """(sources, 4) -> the weighted mean over all sources, FP32."""
    total = table.sum(0)
    return (total[LOSS] / total[WEIGHT]).float()


def mean_losses(table: torch.Tensor) -> torch.Tensor:
    """(sources, 4) -> the weighted mean of each source, (sources,) FP32; NaN where a source has no token."""
    return (table[:, LOSS] / table[:, WEIGHT]).float()


def accuracy(table: torch.Tensor) -> torch.Tensor:
    """(sources, 4) -> the share of supervised tokens that were predicted right, each counting 1 whatever its weight."""
    total = table.sum(0)
    return (total[CORRECT] / total[TOKENS]).float()


class WeightedFinish:
    """Megatron-Core's `finalize_model_grads`, dividing by the sum of weights instead of a whole number of tokens.

    It runs on every rank of every stage, after the last backward pass of a step and before the loss is reported.

    Args:
        finalize: what it stands in front of.
        loss: of the training steps.
        report: called with the step's table, over all ranks.
    """

    def __init__(self, finalize: Callable, loss: TokenLoss, report: Callable[[torch.Tensor], None]) -> None:
        self.finalize, self.loss, self.report = finalize, loss, report

    def __call__(self, model: list[nn.Module], num_tokens: torch.Tensor, **groups: Any) -> None:
        # Of this rank: the callee adds the ranks up.
        weights = self.loss.sums[: self.loss.sources, WEIGHT].sum().to(num_tokens.device)
        self.report(self.loss.finish())
        self.finalize(model, weights, **groups)


def record_verdicts(model: MambaModel) -> None:
    """Makes the model keep which labels it predicts: `model.verdicts`, (1, n) bool each, of one pass in its order.

    It does so while it is evaluated, and in training where `model.judge_training` is set. The logits exist only between
    output layer and loss, chunk by chunk where the loss is in chunks. Under tensor parallelism no rank has them all.
    """
    model.judge_training = False
    model.verdicts = []
    model.register_forward_pre_hook(_forget)
    model.compute_language_model_loss = partial(_judge_first, model, model.compute_language_model_loss)


def _forget(model: Any, _inputs: Any) -> None:
    model.verdicts.clear()


def judges(model: Any) -> bool:
    """Whether the model's next pass tells which labels it predicts."""
    return not model.training or model.judge_training


def _judge_first(model: Any, loss: Callable, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if judges(model):
        model.verdicts.append(predicted_right(labels, logits, model.pg_collection.tp))  # now: the loss overwrites them
    return loss(labels, logits)


@torch.no_grad()
def predicted_right(labels: torch.Tensor, logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Whether each label (b, s) has the largest logit; of equal ones the first counts, as in `torch.argmax`.

    Args:
        labels: token numbers (b, s).
        logits: (s, b, v), this rank's part of the vocabulary.
        group: the tensor-parallel ranks that share the vocabulary.
    """
    best, predicted = logits.max(-1)
    if group.size() > 1:
        predicted += group.rank() * logits.shape[-1]
        largest = best.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        predicted[best < largest] = torch.iinfo(predicted.dtype).max
        dist.all_reduce(predicted, op=dist.ReduceOp.MIN, group=group)
    return predicted.transpose(0, 1) == labels
