"""One QLoRA step on pico equals that of transformers, PEFT and bitsandbytes; and what a step keeps in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.helpers.probes import made_afresh_by, made_by

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return torch.load(made_by("nf4_step", tmp_path_factory.mktemp("ours") / "ours.pt"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return torch.load(made_afresh_by("nf4_step", tmp_path_factory.mktemp("theirs") / "reference.pt"))


@pytest.fixture(scope="module")
def peak(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return json.loads(made_by("nf4_peak", tmp_path_factory.mktemp("peak") / "peak.json").read_text())


def test_the_loss_is_that_of_transformers_peft_and_bitsandbytes(ours, theirs):
    assert theirs["frozen"] == 3 * 2 + 2 * 4 + 4 * 2  # Mamba, attention, shared experts
    assert abs(ours["loss"] / theirs["loss"] - 1) < 1e-6


def test_so_are_all_gradients(ours, theirs):
    """Rows of q, k and v come one below the other; their common A has the sum of the three gradients."""
    expected = theirs["gradients"]
    assert len(ours["layers"]) == 3 + 2 * 2 + 4 * 2
    for path, found in ours["layers"].items():
        names = dict.fromkeys(name for name, _, _ in found["blocks"])
        low = sum(expected[f"{name}.A"] for name in names)
        high = torch.cat([expected[f"{name}.B"][start : start + count] for name, start, count in found["blocks"]])
        for side, wanted in (("A", low), ("B", high)):
            assert (found[side] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (path, side)


def test_no_dequantized_weight_outlives_its_product(ours):
    """Counted: 20 dense linear layers and the experts that have tokens, each once forward and once backward; never more
    than one value and its cast to BF16 at a time, and none when forward is through."""
    assert ours["made"] > 2 * 20
    assert ours["alive"] == 0
    assert ours["peak"] <= 6  # the parts of linear_qkv before they are one: q, k, v of two groups


def test_backward_is_given_the_activations_of_a_16_bit_base(ours):
    """So the plan of kept activations, within 10 % of what CPU ranks measure, is the same."""
    original, nf4 = ours["kept"]
    assert nf4 == pytest.approx(original, rel=0.01)


def test_loading_has_one_weight_in_16_bits_at_a_time(peak):
    """At its peak a rank holds its part of the model in NF4 and, beside it, less than one weight has in the making."""
    assert peak["loading"] <= peak["held"] + peak["largest"] < peak["loading_of_all"]


def test_a_steps_peak_is_that_of_a_16_bit_base_and_one_weight(peak):
    """Beside the model, which is smaller by all that 4 bits spare."""
    bound = peak["step_of_16_bits"] + peak["largest"]
    assert peak["step"] <= bound < peak["step_with_copies"]


def test_scales_stay_fp32_in_a_model_that_is_cast(ours):
    assert ours["scales"] == {torch.float32}
    assert ours["gradients_finite"]
    assert abs(ours["bf16_loss"] / ours["loss"] - 1) < 0.05


def test_no_weight_of_a_linear_layer_is_in_16_bits(ours):
    """By hand, pico: embedding and output of 312 rows (384 with padding), norms, convolutions, decays, routers."""
    vocabulary = 2 * 384 * 128
    mamba = 3 * (128 + 512 * 5 + 3 * 8 + 256)
    assert ours["float_values"] == vocabulary + mamba + 2 * 128 + 4 * (128 + 8 * 128) + 128
