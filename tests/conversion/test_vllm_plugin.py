"""What `make check-vllm` gives to vLLM, without vLLM: experts' products, and a cache that cuts off (tests/vllm_cpu)."""

from __future__ import annotations

import pytest
import torch

from evaluation.hf_model import load_reference
from nano3.arch import PRESETS
from nano3.fp8_emulation import rounded
from tests.vllm_cpu.cache import toward_zero
from tests.vllm_cpu.products import Adapters, Matrices, relu2_experts

CHOSEN = torch.tensor([[0], [1]])
ONES = torch.ones(2, 1)


def one(value: float) -> torch.Tensor:
    """The same 1x1 matrix for two experts."""
    return torch.full((2, 1, 1), value)


def test_products_are_those_of_the_reference_on_picos_experts():
    experts = load_reference(PRESETS["pico"], torch.float32).get_decoder().layers[1].mixer.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 128, generator=generator)
    weights, chosen = torch.rand(20, 8, generator=generator).topk(2)
    up, down = experts.up_proj.detach(), experts.down_proj.detach()
    with torch.no_grad():
        expected = experts(hidden, chosen, weights)
    found = relu2_experts(hidden, Matrices(up), Matrices(down), weights, chosen)
    assert (found - expected).abs().max() < 1e-5
    swapped = up.clone()
    swapped[[0, 1]] = up[[1, 0]]
    wrong = relu2_experts(hidden, Matrices(swapped), Matrices(down), weights, chosen)
    assert (wrong - expected).abs().max() > 0.01


def test_each_token_gets_its_own_adapter_by_hand():
    """down (up x)^2 with up 2, down 3 and x = 1 is 12. Slot 0 adds 1 to up of expert 1: 27; slot 1 would add 10."""
    low, high = torch.ones(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
    high[0, 1], high[1] = 1.0, 10.0
    up = Matrices(one(2.0), adapters=Adapters(low, high))
    hidden, down = torch.ones(2, 1), Matrices(one(3.0))
    assert relu2_experts(hidden, up, down, ONES, CHOSEN, torch.tensor([-1, 0])).tolist() == [[12], [27]]
    assert relu2_experts(hidden, up, down, ONES, CHOSEN, torch.tensor([0, 1])).tolist() == [[12], [432]]
    assert relu2_experts(hidden, up, down, ONES, CHOSEN).tolist() == [[12], [12]]
    assert relu2_experts(-hidden, up, down, ONES, CHOSEN).tolist() == [[0], [0]]


def test_codes_scales_and_rounded_inputs_by_hand():
    """1.07 becomes 1.125 in E4M3; code 2 with scales 0.5 and 4 of two experts: 1.125^2 and 4.5^2 * 16."""
    codes = one(2.0).to(torch.float8_e4m3fn)
    up = Matrices(codes, torch.tensor([0.5, 2.0]), torch.tensor(1.0))
    down = Matrices(codes, torch.tensor([0.5, 8.0]))
    hidden = torch.full((2, 1), 1.07)
    assert relu2_experts(hidden, up, down, ONES, CHOSEN).tolist() == [[1.265625], [324.0]]
    assert relu2_experts(1000 * hidden, up, down, ONES, CHOSEN)[0].tolist() == [448.0**2]


def test_a_cache_that_cuts_off_by_hand():
    """Steps of an eighth between 1 and 2, of 2^-9 below 2^-6, nothing above 448 scales; the sign stays."""
    value = torch.tensor([1.0, 1.24, 1.2499, -1.24, 500.0, 2**-9 * 1.9, 2**-10, 0.0])
    expected = [1.0, 1.125, 1.125, -1.125, 448.0, 2**-9, 0.0, 0.0]
    assert toward_zero(value, 1.0).tolist() == expected
    assert toward_zero(value * 0.25, 0.25).tolist() == [0.25 * x for x in expected]
    assert rounded(value, 1.0)[1] == pytest.approx(1.25)


def test_what_is_cut_off_is_the_largest_code_not_above():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).abs() * 10
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = codes[torch.searchsorted(codes, values, right=True) - 1]
    assert torch.equal(toward_zero(values, 1.0), expected)
