"""The stand-ins' norm and the delta's product against plain PyTorch in FP64; attention at scores that overflow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nano3.cpu import rms
from nano3.cpu.products import product
from nano3.cpu.te.causal import CausalAttention
from nano3.cpu.te.norm import rms_norm
from nano3.lora.delta import add_product, projected


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def test_large_scores_stay_finite():
    query, key, value = (random(40, 1, 2, 8, dtype=torch.float32) for _ in range(3))
    out = CausalAttention.apply(query * 100, key * 100, value, 1.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (query, key, value)))


def test_norm_and_its_gradients_are_pytorchs():
    x, weight, dout = random(3, 2, 8), random(8), torch.randn(3, 2, 8, dtype=torch.float64)
    out, expected = rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3)
    torch.testing.assert_close(out, expected)
    for got, want in zip(
        torch.autograd.grad(out, (x, weight), dout), torch.autograd.grad(expected, (x, weight), dout), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_norms_on_other_devices_are_the_same_function():
    """What CUDA tensors would go through, here on the CPU: three groups of four."""
    x, weight, dout = (torch.randn(5, 12, dtype=torch.float64) for _ in range(3))
    (out, rstd), (plain_out, plain_rstd) = (f(x, weight[0], 1e-3, 4) for f in (rms.normalize, rms.plain))
    torch.testing.assert_close(out, plain_out)
    torch.testing.assert_close(rstd, plain_rstd)
    inputs = (dout, x, weight[0], rstd)
    torch.testing.assert_close(rms.normalize_backward(*inputs), rms.plain_backward(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_pytorchs(dtype):
    x, weight = torch.randn(3, 5, 4).to(dtype), torch.randn(6, 4).to(dtype)
    found = product(x, weight)
    torch.testing.assert_close(found, x @ weight.t())
    assert product(weight, x[0]).shape == (6, 5)
    assert product(x.transpose(0, 1), weight).is_contiguous()
    assert product(torch.empty(0, 4, dtype=dtype), weight).shape == (0, 6)


def test_memory_that_loops_have_seen_can_be_freed():
    """Megatron-Core frees what it will compute again; `Tensor.numpy` would forbid it."""
    out = rms_norm(torch.randn(4, 8), torch.ones(8), 1e-3)
    out.untyped_storage().resize_(0)
    assert out.untyped_storage().nbytes() == 0


def test_delta_is_added_in_place_with_its_gradients():
    x, low, high = random(3, 2, 5), random(3, 2, 4), random(5, 4)
    assert torch.autograd.gradcheck(lambda *t: add_product(t[0] * 1, t[1], t[2], 0.5), (x, low, high))
    out = torch.ones(1, 2)
    assert torch.autograd.gradcheck(projected, (x, random(4, 5)))
    made = add_product(out, torch.tensor([[2.0]]), torch.tensor([[3.0], [-1.0]]), 0.5)
    assert made.tolist() == [[4.0, 0.0]]
    assert made.data_ptr() == out.data_ptr()
