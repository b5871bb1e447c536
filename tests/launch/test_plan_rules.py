"""Preflight and the recipe refuse the same settings and layouts, in the same words, and begin with the same ones."""

from __future__ import annotations

import pytest

from finetune.checks import check_run
from finetune.command import parser, resolve
from finetune.settings import Run, Settings
from launch import preflight
from launch.plan.hardware import HARDWARE
from launch.plan.layout import Layout
from launch.plan.plan_settings import Plan, default_layout
from launch.plan.weights import adapter_weights
from nano3.cli import UserError
from nano3.overrides import apply_overrides
from nano3.targets import is_routed
from tests.launch.test_preflight import NANO, asked


def check_recipe(arguments: list[str], nodes: int = 1, per_node: int = 8) -> None:
    """The recipe's own checks of the same settings."""
    settings = Settings(layout=default_layout(NANO, per_node))
    apply_overrides(settings, arguments)
    check_run(Run("", "", "", None, "", nodes, per_node, False, settings), NANO)


@pytest.mark.parametrize(
    "setting",
    [
        "lora.rank_pattern=in_proj:abc",
        "lora.rank_pattern=in_proj:0",
        "lora.targets=nothing",
        "lora.rank=0",
        "lora.dropout=1",
        "train.steps=0",
        "lora.rank=4096",
        "lora.rank_pattern=in_proj:4096",
        "train.loss_chunk=-1",
        "train.recompute=full,moe",
        "train.recompute=moe,moe_act",
        "checkpoint.keep=0",
    ],
)
def test_what_the_recipe_refuses_preflight_refuses_in_the_same_words(setting):
    with pytest.raises(UserError) as theirs:
        check_recipe([setting])
    with pytest.raises(UserError) as ours:
        asked("--hardware", "h100", setting)
    assert str(ours.value) == str(theirs.value)


def test_a_loss_in_chunks_needs_a_frozen_output_layer():
    settings = ["train.loss_chunk=512", "lora.targets=in_proj,output_layer"]
    words = r"train\.loss_chunk=512 needs a frozen output layer, and lora\.targets names output_layer"
    with pytest.raises(UserError, match=words):
        check_recipe(settings)
    with pytest.raises(UserError, match=words):
        asked("--hardware", "h100", *settings)
    with pytest.raises(UserError, match="method=full trains it"):
        asked("--hardware", "h100", "train.loss_chunk=512", "method=full")
    check_recipe(["train.loss_chunk=512"])
    check_recipe(["lora.targets=in_proj,output_layer"])


def test_a_rank_above_what_the_reader_takes_is_refused_by_both():
    for settings in (["lora.max_rank=32", "lora.rank=64"], ["lora.max_rank=32", "lora.rank_pattern=in_proj:64"]):
        with pytest.raises(UserError, match=r"rank 64 of \S+ is above lora\.max_rank=32") as theirs:
            check_recipe(settings)
        with pytest.raises(UserError) as ours:
            asked("--hardware", "h100", *settings)
        assert str(ours.value) == str(theirs.value)
    check_recipe(["lora.max_rank=32", "lora.rank=32"])


def test_adapters_are_planned_one_pack_at_a_time():
    with pytest.raises(UserError, match=r"micro_batch=4: a pack is one sequence .*cu_seqlens.*train\.global_batch"):
        asked("--hardware", "h100", "micro_batch=4")
    assert asked("--hardware", "h100", "micro_batch=4", "method=full").plan.micro_batch == 4


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        ("layout.etp=2 layout.ep=4", True),
        ("layout.etp=2 layout.ep=4 lora.experts=each", True),
        ("layout.etp=2 layout.ep=4 lora.dora=true", True),
        ("layout.etp=2 layout.ep=4 lora.dropout=0.1", True),
        ("layout.tp=4 lora.rank=6", False),
        ("layout.tp=4 lora.rank=6 lora.targets=word_embeddings", True),
        ("layout.tp=4 lora.rank=6 lora.targets=output_layer", False),
        ("layout.tp=4 lora.rank=6 lora.targets=*.mlp.experts.*", True),
    ],
)
def test_layouts_of_adapters_are_right_for_both_or_for_neither(settings, right):
    _, text = preflight.report(asked("--hardware", "h100", *settings.split()), files=False)
    if right:
        check_recipe(settings.split())
        assert "CANNOT BE RIGHT" not in text
    else:
        with pytest.raises(UserError) as refused:
            check_recipe(settings.split())
        assert text.startswith(f"CANNOT BE RIGHT: {refused.value}\n")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.recompute=mamba,moe_act", "moe_act is of mixture-of-experts layers, and the model has none"),
        ("lora.experts=each", "the model has no experts; leave it out"),
    ],
)
def test_what_is_of_experts_is_refused_for_a_dense_member(setting, words):
    with pytest.raises(UserError, match=words):
        asked("--hardware", "h100", "--model", "nano-4b", setting)


def test_a_dense_member_is_planned_without_experts():
    code, text = preflight.report(
        asked("--hardware", "h100", "--gpus-per-node", "1", "--model", "nano-4b"), files=False
    )
    assert code == 0
    assert "kept by dense MLP" in text
    assert "expert" not in text
    asked("--hardware", "h100", "--model", "nano-4b", "lora.preset=peft")


@pytest.mark.parametrize(("gpu", "nodes", "ep"), [("h100", 2, 8), ("gb200", 2, 4), ("b300", 1, 8)])
def test_preflight_and_the_recipe_begin_with_the_same_layout(gpu, nodes, ep):
    per_node = HARDWARE[gpu].gpus_per_node
    run, _ = resolve(parser().parse_args(["--nodes", str(nodes), "--gpus-per-node", str(per_node), "--dry-run"]))
    assert asked("--hardware", gpu, "--nodes", str(nodes)).plan.layout == run.settings.layout == Layout(ep=ep)


def test_an_adapter_that_all_experts_share_is_planned_whole_where_experts_are_sliced():
    """As `nano3.lora.expert_adapters.SharedExpertsAdapter` builds it: A and B have the experts' whole widths."""
    adapters = Plan().adapters(NANO)
    assert adapters is not None
    held = [
        sum(held.nbytes for held in adapter_weights(NANO, layout, 0, 2, adapters) if is_routed(held.name))
        for layout in (Layout(ep=8), Layout(ep=4, etp=2))
    ]
    # fc1 2688 -> 1856 and back, rank 32, in BF16, in each of 23 MoE layers.
    assert held == [2 * 2 * 32 * (2688 + 1856) * 23] * 2
