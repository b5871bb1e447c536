"""Tensor-parallel ranks drop the same of an input that each has whole, and not of one that they share out."""

import json
from typing import Any

import pytest

from tests.helpers.probes import made_by

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("dropout") / "out.json"
    return json.loads(made_by("dropout_probe", out).read_text())


@pytest.mark.parametrize("layout", ["tp2", "tp2.ep2"])
def test_dropout_agrees_where_the_input_is_the_same_and_nowhere_else(probe, layout):
    (other, same), (parts_other, parts_same) = probe[layout]["alike"]["whole"], probe[layout]["alike"]["part"]
    assert other == 0
    assert same > 10
    assert parts_same == 0
    assert parts_other > 10
    assert probe[layout]["generators"]
    assert 0.48 < probe[layout]["kept"] < 0.52


def test_ranks_with_slices_of_one_expert_drop_the_same_tokens_features(probe):
    """fc1's input is whole on both, fc2's is cut."""
    other, same = probe["tp2.etp2"]["alike"]["experts"]
    assert other == 0
    assert same > 5
    other, same = probe["tp2.etp2"]["alike"]["expert slices"]
    assert same == 0
    assert other > 5
    assert probe["tp2.etp2"]["generators"]


def test_with_one_generator_the_experts_tokens_would_take_the_ranks_apart(probe):
    assert probe["one generator"]["alike"]["whole"][0] > 0
    assert not probe["one generator"]["generators"]
