"""Recomputation acts: saved bytes fall by what one can work out by hand, and nothing else changes."""

import json

import pytest

from finetune.checks import check_run
from finetune.settings import Run, Settings, TrainSettings
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from tests.helpers.probes import made_by
from tests.helpers.tiny import TINY_CONFIG

TOKENS, RANK, FP32 = 64, 4, 4
HIDDEN, LAYERS = TINY_CONFIG["hidden_size"], len(TINY_CONFIG["hybrid_override_pattern"])
MOE = TINY_CONFIG["hybrid_override_pattern"].count("E")
NORM = TOKENS * (HIDDEN + 1) * FP32
"""What a norm keeps: its input and one number a token."""
ROUTED = TOKENS * TINY_CONFIG["num_experts_per_tok"] * TINY_CONFIG["moe_intermediate_size"] * FP32
SHARED = TOKENS * TINY_CONFIG["moe_shared_expert_intermediate_size"] * FP32


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Bytes, loss and gradients of every case of tests/helpers/recompute_probe.py."""
    out = tmp_path_factory.mktemp("recompute") / "out.json"
    return json.loads(made_by("recompute_probe", out).read_text())


def fall(found, case):
    """Bytes that a case keeps less. Its first norm has to keep something too, now that its input has a gradient."""
    return found["none"]["bytes"] - found[case]["bytes"] + NORM


def test_full_keeps_the_inputs_of_the_layers(found):
    assert found["full"]["bytes"] == LAYERS * TOKENS * HIDDEN * FP32 + NORM  # and what the final norm keeps


def test_megatrons_own_full_is_ignored(found):
    # Should a later release act on it, `full` need no longer be done here.
    assert found["Megatron-Core's full"]["bytes"] == found["none"]["bytes"]


def test_core_attention_keeps_what_others_keep(found):
    # Why it is not offered: this is all, and on GPUs even the output is the next adapter's input, kept anyway.
    width = TINY_CONFIG["num_attention_heads"] * (TINY_CONFIG["head_dim"] + 1)
    assert found["none"]["bytes"] - found["Megatron-Core's core_attn"]["bytes"] <= TOKENS * width * FP32


def test_each_part_saves_what_it_says(found):
    # Activation of routed experts: what fc2's adapter gets goes; the fused kernel keeps x and the router's weight.
    assert fall(found, "moe_act") == MOE * ROUTED
    # Shared expert: relu(x) and its square go, and the low-rank middle of both adapters.
    assert fall(found, "shared_experts") == MOE * (2 * SHARED + 2 * TOKENS * RANK * FP32)
    assert fall(found, "layernorm") == MOE * NORM
    assert fall(found, "moe") > fall(found, "moe_act") + fall(found, "shared_experts")
    assert fall(found, "mamba") > 0


def test_parts_add_up(found):
    parts = ("moe_act", "shared_experts", "layernorm", "mamba")
    assert fall(found, "three and mamba") == sum(fall(found, part) for part in parts)


@pytest.mark.parametrize("plain", ["none", "none, dropout", "none, first layer without adapter"])
def test_loss_gradients_and_expert_counts_stay(found, plain):
    cases = [name for name in found if name.partition(",")[2] == plain.partition(",")[2]]
    assert len(cases) > 1
    for case in cases:
        assert found[case]["loss"] == found[plain]["loss"], case
        assert found[case]["error"] <= 1e-5, case  # of gradients of about 10
        assert found[case]["missing"] == [], case
        assert found[case]["experts"] == found[plain]["experts"], case
        # A router that runs twice must not count twice, here or in Megatron-Core's balancing.
        assert found[case]["megatron"] == found[plain]["megatron"], case
    for load in found[plain]["experts"].values():
        assert sum(load) == TOKENS * TINY_CONFIG["num_experts_per_tok"]


def test_a_recomputed_first_layer_needs_an_input_with_a_gradient(found):
    missing = found["moe, first layer without adapter, fault"]["missing"]
    assert missing
    assert all("layers.1." in name for name in missing)  # the first experts; nothing before them has an adapter


@pytest.mark.parametrize(
    ("recompute", "message"),
    [(["full", "moe"], "full already covers moe"), (["moe", "moe_act"], "moe already covers moe_act")],
)
def test_what_is_covered_already_is_refused(recompute, message):
    run = Run("", "", "", None, "", 1, 1, True, Settings(train=TrainSettings(global_batch=4, recompute=recompute)))
    with pytest.raises(UserError, match=message):
        check_run(run, Arch.load(PRESETS["pico"]))
