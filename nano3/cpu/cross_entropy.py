"""The two passes of Megatron-Core's vocabulary-parallel cross entropy over all logits, compiled.

PyTorch's `exp` on a CPU takes 14 ns for every logit that pads the vocabulary, whose probability is zero, and each of
the other operations is a pass over memory of its own.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from nano3.cpu.arrays import array
from nano3.cpu.compiled import LOG2_E, exp2, loops

LOWEST = -87.0
"""exp() of what is lower is taken for zero: of padding exactly, of anything else with an error of 1e-38 of the sum."""


@loops
def exponentials(logits, largest, target, elsewhere, predicted, sums):
    """logits (t, v) become exp(logits - largest (t,)), with their sums (t,); predicted (t,): logits - largest at target
    (t,), and 0 where that is `elsewhere` (t,), in the part of another rank."""
    rows, columns = logits.shape
    zero, log2_e, lowest = logits.dtype.type(0), logits.dtype.type(LOG2_E), logits.dtype.type(LOWEST)
    for t in range(rows):
        top, total = largest[t], zero
        predicted[t] = zero if elsewhere[t] else logits[t, target[t]] - top
        for j in range(columns):
            below = logits[t, j] - top
            value = zero if below < lowest else exp2(below * log2_e)  # a NaN stays one
            logits[t, j] = value
            total += value
        sums[t] = total


@loops
def gradients(softmax, target, elsewhere, dloss):
    """softmax (t, v) becomes the gradient of the logits: (softmax - [column is target]) * dloss (t,)."""
    rows, columns = softmax.shape
    one = softmax.dtype.type(1)
    for t in range(rows):
        if not elsewhere[t]:
            softmax[t, target[t]] -= one
        for j in range(columns):
            softmax[t, j] *= dloss[t]


def calculate_logits_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (s, b, v) in FP32, and the largest of each token."""
    logits = logits.float()
    return logits, logits.amax(-1)


def calculate_predicted_logits(
    logits: torch.Tensor, target: torch.Tensor, logits_max: torch.Tensor, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits (s, b, v), in whose place the exponentials come, and target (s, b), of the columns `start` to `end`.

    Returns where another rank has the target, the target's column here or 0 (s * b,), its logit less the largest, the
    sum of the exponentials (s, b both), the exponentials.
    """
    elsewhere = (target < start) | (target >= end)
    here = (target - start).masked_fill_(elsewhere, 0).view(-1)
    predicted, sums = torch.empty_like(logits_max), torch.empty_like(logits_max)
    flat = [array(t.view(-1)) for t in (logits_max, here, elsewhere, predicted, sums)]
    exponentials(array(logits.view(-1, logits.shape[-1])), *flat)
    increment_version(logits)  # what autograd saved of them is no longer there: it must notice
    return elsewhere, here, predicted, sums, logits


def calculate_gradients(
    grad_2d: torch.Tensor,
    arange_1d: torch.Tensor,
    masked_target_1d: torch.Tensor,
    softmax_update: torch.Tensor,
    grad_input: torch.Tensor,
    grad_output: torch.Tensor,
) -> torch.Tensor:
    """`grad_input` (s, b, v), of which `grad_2d` (s * b, v) is a view, from softmax to gradient; `softmax_update`
    (s * b,) is 0 where another rank has the target."""
    del arange_1d
    dloss = grad_output.reshape(-1).to(grad_2d.dtype).contiguous()
    gradients(*(array(t) for t in (grad_2d, masked_target_1d, softmax_update == 0, dloss)))
    increment_version(grad_2d)  # a second backward pass is refused
    return grad_input


def install() -> None:
    """Replaces the methods where Megatron-Core looks them up."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    for method in (calculate_logits_max, calculate_predicted_logits, calculate_gradients):
        setattr(VocabParallelCrossEntropy, method.__name__, staticmethod(method))
