"""Largest magnitudes from bits, by hand and against torch."""

import struct
from pathlib import Path

import pytest
import torch

from conversion.checkpoint import tensor_digests
from conversion.checkpoint.tensor_digests import largest_magnitude, raw_bytes, refuse_not_finite
from nano3.cli import UserError

WORDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, -2.0, 0.5], 2.0), ([-0.0, 0.0], 0.0), ([3.0], 3.0), ([-3.0], 3.0), ([1e-7, -1e-6], None), ([], 0.0)],
)
def test_by_hand(word: str, values: list[float], expected: float | None):
    tensor = torch.tensor(values, dtype=WORDS[word])
    found = largest_magnitude(raw_bytes(tensor), word)
    assert found == (float(tensor.abs().amax()) if expected is None else expected)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 99])
def test_one_value_that_is_not_finite_is_found(word: str, bad: float, place: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_digests, "_SLICE", 16)  # bytes: several slices
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(WORDS[word])
    assert largest_magnitude(raw_bytes(tensor), word) == float(tensor.abs().amax())
    tensor[place] = bad
    with pytest.raises(UserError, match=r"^F: a.weight holds NaN or infinity"):
        refuse_not_finite(largest_magnitude(raw_bytes(tensor), word), "a.weight", Path("F"))


def test_a_nan_with_the_sign_bit():
    assert largest_magnitude(bytearray(struct.pack("<I", 0xFFC00000)), "F32") != 0.0
    with pytest.raises(UserError):
        refuse_not_finite(largest_magnitude(bytearray(struct.pack("<H", 0xFFC0)), "BF16"), "x", Path("F"))
