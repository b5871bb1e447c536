"""The CPU's causal attention against softmax written out, in FP64: values and all three gradients."""

import math

import pytest
import torch

from nano3.cpu.te.causal import CausalAttention
from nano3.cpu.te.causal_loops import KEYS, ROWS


def plain(query, key, value, scale):
    """Query (s, b, h, d), key and value (s, b, g, d): every head of a group sees that group's keys up to its token."""
    repeats = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    unseen = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    return torch.einsum("bhst,tbhd->sbhd", scores.masked_fill(unseen, -math.inf).softmax(-1), value)


@pytest.mark.parametrize(
    ("tokens", "heads", "groups"),
    [
        (1, 2, 1),
        (KEYS + 7, 4, 2),  # pico's heads to a group
        (200, 16, 1),  # Nano's: a block of keys has more rows than a block of scores
        (2 * KEYS, 32, 2),
        (ROWS + KEYS + 3, 1, 1),
    ],
)
def test_values_and_gradients_equal_softmax_written_out(tokens, heads, groups):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 2, heads, 8), (tokens, 2, groups, 8), (tokens, 2, groups, 8))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found, expected = CausalAttention.apply(*inputs, 0.3), plain(*inputs, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
