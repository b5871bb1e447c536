"""The compiled passes of the cross entropy: PyTorch's values and gradients, padding of no weight, two ranks' parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nano3.cpu.cross_entropy import calculate_gradients, calculate_logits_max, calculate_predicted_logits

TOKENS, VOCABULARY, PADDED = 6, 100, 128
LOWEST = torch.finfo(torch.float32).min


def of_parts(logits: torch.Tensor, target: torch.Tensor, dloss: torch.Tensor, ranks: int):
    """Loss and gradient as tensor-parallel ranks compute them, one after the other, with the sums between."""
    width = logits.shape[-1] // ranks
    parts = [part.contiguous() for part in logits.clone().split(width, -1)]
    largest = torch.stack([calculate_logits_max(part)[1] for part in parts]).amax(0)
    found = [calculate_predicted_logits(p, target, largest, i * width, (i + 1) * width) for i, p in enumerate(parts)]
    total = torch.stack([part[3] for part in found]).sum(0)
    loss = total.log() - torch.stack([part[2] for part in found]).sum(0)
    gradients = []
    for elsewhere, here, _, _, exponentials in found:
        softmax = exponentials.div_(total.unsqueeze(-1))
        update = 1.0 - elsewhere.view(-1).float()
        arange = torch.arange(len(here))
        gradients.append(calculate_gradients(softmax.view(-1, width), arange, here, update, softmax, dloss))
    return loss, torch.cat(gradients, -1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_and_gradient_are_those_of_pytorch(ranks):
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(TOKENS, 1, PADDED, generator=generator)
    logits[..., VOCABULARY:] = LOWEST
    target = torch.randint(0, VOCABULARY, (TOKENS, 1), generator=generator)
    dloss = torch.rand(TOKENS, 1, generator=generator)
    exact = logits[..., :VOCABULARY].double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    expected.backward(dloss.double())
    loss, gradient = of_parts(logits, target, dloss, ranks)
    assert (loss - expected).abs().max() < 2e-6
    assert exact.grad is not None
    assert (gradient[..., :VOCABULARY] - exact.grad).abs().max() < 1e-6
    assert (gradient[..., VOCABULARY:] == 0).all()  # exactly: padding has no probability


def test_by_hand():
    """Two equal logits of four columns: half of the probability each, a loss of log 2."""
    logits = torch.tensor([[[1.0, 1.0, LOWEST, -200.0]]])
    loss, gradient = of_parts(logits, torch.tensor([[1]]), torch.tensor([[2.0]]), 1)
    assert float(loss) == pytest.approx(0.6931472, abs=1e-7)
    assert gradient.flatten().tolist() == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(bad):
    logits = torch.tensor([[[1.0, bad, 0.0, -1.0]]])
    loss, _ = of_parts(logits, torch.tensor([[0]]), torch.ones(1, 1), 1)
    assert not torch.isfinite(loss).any()


def test_autograd_knows_that_logits_and_softmax_were_overwritten():
    """Else a second backward pass would give another gradient, without a word."""
    logits = torch.zeros(1, 1, 4)
    versions = [logits._version]
    found = calculate_predicted_logits(logits, torch.tensor([[1]]), torch.zeros(1, 1), 0, 4)
    versions.append(logits._version)
    softmax = found[-1]
    calculate_gradients(softmax.view(-1, 4), torch.arange(1), found[1], torch.ones(1), softmax, torch.ones(1, 1))
    assert versions == [0, 1]
    assert softmax._version == 2
