"""Targets, sizes and the numbers of DoRA by hand; what settings are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finetune.checks import check_run
from finetune.settings import LoraSettings, Run, Settings
from launch.plan.layout import Layout
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.lora.dora import scale_of, squared_change, squared_lengths
from nano3.lora.parameter_groups import is_b, is_magnitude
from nano3.targets import PRESETS, Size, select, sizes
from tests.helpers.tiny import TINY_CONFIG

ARCH = Arch.from_config(TINY_CONFIG)
"""MEM*E."""
PATHS = select(ARCH, PRESETS["all"], "shared")


def test_the_vocabulary_is_adapted_only_by_name():
    assert all("decoder.layers" in path for path in PATHS)
    assert select(ARCH, ["word_embeddings", "output_layer"], "none") == ["embedding.word_embeddings", "output_layer"]


def test_peft_preset_leaves_out_what_peft_refuses():
    chosen = select(ARCH, PRESETS["peft"], "shared")
    assert not any("out_proj" in path or ".mlp.experts." in path for path in chosen)
    assert len(chosen) == 2 + 2 + 2 * 2  # in_proj of two layers, attention, shared experts of two layers


def test_the_last_pattern_that_names_a_layer_holds():
    found = sizes(PATHS, 4, 8.0, ["linear_fc1:2", "*.shared_experts.*:16"], ["*.layers.1.*:1"])
    assert found["decoder.layers.0.mixer.in_proj"] == Size(4, 2.0)
    assert found["decoder.layers.1.mlp.experts.linear_fc1"] == Size(2, 0.5)
    assert found["decoder.layers.1.mlp.shared_experts.linear_fc1"] == Size(16, 1 / 16)
    assert found["decoder.layers.4.mlp.shared_experts.linear_fc2"] == Size(16, 0.5)
    assert found["decoder.layers.4.mlp.experts.linear_fc1"] == Size(2, 4.0)


def test_rslora_divides_by_the_root():
    found = sizes(PATHS, 4, 8.0, ["in_proj:16"], rslora=True)
    assert found["decoder.layers.0.mixer.in_proj"].scale == 2.0
    assert found["decoder.layers.0.mixer.out_proj"].scale == 4.0


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["q_proj:8"], "names no adapted layer"),
        (["in_proj"], "not TARGET:VALUE"),
        (["in_proj:"], "not TARGET:VALUE"),
        ([":8"], "not TARGET:VALUE"),
        (["in_proj:0"], "positive whole number"),
        (["in_proj:2.5"], "positive whole number"),
        (["in_proj:8", "*.mixer.*:4"], "later patterns name every layer of 'in_proj:8'"),
    ],
)
def test_patterns_that_say_nothing_are_refused(patterns, words):
    with pytest.raises(UserError, match=words):
        sizes(PATHS, 4, 8.0, patterns)


@pytest.mark.parametrize("value", ["-1", "nan", "x"])
def test_an_alpha_must_be_positive(value):
    with pytest.raises(UserError, match="positive number"):
        sizes(PATHS, 4, 8.0, alpha_pattern=[f"in_proj:{value}"])


def refused(layout: Layout, ranks: int = 2, **lora: Any) -> str:
    settings = Settings(layout=layout, lora=LoraSettings(**lora))
    with pytest.raises(UserError) as error:
        check_run(Run("", "", "", None, "", 1, ranks, True, settings), ARCH)
    return str(error.value)


def test_settings_that_cannot_be_right_are_refused():
    assert "each, but no target names routed experts" in refused(Layout(), experts="each", preset="attention")
    assert "rank 3 of decoder.layers.0.mixer.in_proj" in refused(Layout(tp=2), rank_pattern=["in_proj:3"])
    assert "lora.plus_ratio=0" in refused(Layout(), plus_ratio=0)
    # Experts' adapters and the embedding's are not split over tensor-parallel ranks: any rank will do.
    odd = LoraSettings(targets=["linear_fc1", "word_embeddings"], rank_pattern=["*.experts.*:3", "word_embeddings:5"])
    check_run(Run("", "", "", None, "", 1, 2, True, Settings(layout=Layout(tp=2), lora=odd)), ARCH)


def test_parameter_groups_by_name():
    names = ["layers.0.mixer.in_proj.adapter.linear_in.weight", "experts.linear_fc1.adapter.linear_out.weight3"]
    names += ["word_embeddings.adapter.magnitude", "self_attention.linear_out.weight"]
    assert [is_b(name, None) for name in names] == [False, True, False, False]
    assert [is_magnitude(name, None) for name in names] == [False, False, True, False]


def test_lengths_without_forming_the_sum():
    # W = (3, 4), B A = (0, 8) scaled by 1/2: V = (3, 8); and a row of zeros.
    weight, low, high = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0], [0.0]])
    squares = squared_lengths(weight)
    assert squares.tolist() == [25.0, 0.0]
    lengths = (squares + squared_change(weight, low, high, 0.5)).sqrt()
    assert lengths.tolist() == pytest.approx([math.sqrt(73), 0.0])
    assert squared_change(weight, low, torch.zeros(2, 1), 0.5).tolist() == [0.0, 0.0]
    assert scale_of(2 * lengths, lengths).tolist() == [2.0, 1.0]
    # Slices of the input add up, as tensor-parallel ranks do it.
    parts = [squared_change(weight[:, i : i + 1], low[:, i : i + 1], high, 0.5) for i in range(2)]
    assert (parts[0] + parts[1]).tolist() == squared_change(weight, low, high, 0.5).tolist() == [48.0, 0.0]
