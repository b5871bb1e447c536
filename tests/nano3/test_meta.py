"""The real 30B model, every rank of a layout, on the meta device: nothing is missing and nothing is there twice."""

import json

import pytest

from finetune.command import trainable_parameters
from finetune.settings import LoraSettings, Run, Settings
from nano3.arch import Arch, resolve_model
from tests.helpers.rank_server import done_by

PARAMETERS = 31_577_937_344
ROUTER_BIASES = 2_944
LAYOUTS = ["1", "8,ep=8", "4,tp=2,ep=2,pp=2", "3,pp=3", "5,pp=5", "4,tp=4,ep=4"]


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, list[int]]]:
    return json.loads(done_by("tests.helpers.meta_probe", "nano", *LAYOUTS).splitlines()[-1])


def test_one_rank_holds_the_published_number_of_parameters(counts):
    assert counts["1"]["ranks"] == [PARAMETERS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_of_a_layout_sum_to_the_whole(counts, layout):
    assert sum(counts[layout]["owned"]) == PARAMETERS + ROUTER_BIASES


def test_expert_parallel_ranks_hold_equal_parts(counts):
    held = counts["8,ep=8"]["ranks"]
    routed = 23 * 128 * 2 * 1856 * 2688  # layers, experts, matrices, their shape
    assert held == [PARAMETERS - routed + routed // 8] * 8
    assert round(held[0] / 1e9, 4) == 5.8750


CASES = ["1:1:shared:plain", "1:1:each:plain", "8:8:each:plain", "1:1:none:plain", "1:1:shared:dora", "1:1:each:dora"]


@pytest.fixture(scope="module")
def adapters() -> dict[str, int]:
    return json.loads(done_by("tests.helpers.meta_adapters_probe", "nano", *CASES).splitlines()[-1])


def counted(experts: str, dora: bool, targets: list[str] | None = None) -> int:
    """What the recipe says."""
    arch = Arch.load(resolve_model("nano"))
    settings = Settings(lora=LoraSettings(experts=experts, dora=dora, targets=targets or []))  # type: ignore[arg-type]
    return trainable_parameters(Run("", "", "", None, "", 1, 1, True, settings), arch)


ROUTED = 23 * 2 * 32 * (1856 + 2688)
"""Trainable parameters of the routed experts with one adapter a layer: layers, matrices, rank, in + out."""


def test_trainable_parameters_at_rank_32():
    """33.4M with one adapter for the experts of a layer, 883M with one for each: as NVIDIA counts its recipe."""
    assert counted("shared", False) == 33_368_064
    assert counted("each", False) == 33_368_064 + 127 * ROUTED == 882_841_600
    assert counted("none", False) == 33_368_064 - ROUTED


@pytest.mark.full
def test_the_model_trains_as_many(adapters):
    for kind in ("shared", "each", "none"):
        assert adapters[f"1:1:{kind}:plain"] == counted(kind, False)
    assert adapters["8:8:each:plain"] == 33_368_064 + 15 * ROUTED  # 16 experts on each of 8 ranks


@pytest.mark.full
def test_dora_adds_a_length_for_every_output_row(adapters):
    attention = 6 * (4608 + 2688)
    mamba, shared = 23 * (10304 + 2688), 23 * (3712 + 2688)
    experts = 23 * 128 * (1856 + 2688)
    for kind in ("shared", "each"):
        added = adapters[f"1:1:{kind}:dora"] - adapters[f"1:1:{kind}:plain"]
        assert added == attention + mamba + shared + experts
        assert adapters[f"1:1:{kind}:dora"] == counted(kind, True)


def test_embedding_and_output_layer_on_request():
    assert counted("shared", False, ["word_embeddings", "output_layer"]) == 2 * 32 * (131072 + 2688)
