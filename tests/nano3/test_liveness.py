"""Adapters that learn nothing stop a run by name; experts that had nothing to learn from do not."""

import json

import pytest

from tests.helpers.probes import made_by
from tests.helpers.tiny import TINY_CONFIG

pytestmark = pytest.mark.full
FC1 = "layers.1.mlp.experts.linear_fc1.adapter"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/helpers/liveness_probe.py found out."""
    out = tmp_path_factory.mktemp("liveness") / "out.json"
    return json.loads(made_by("liveness_probe", out).read_text())


@pytest.mark.parametrize("case", ["healthy", "shared", "resumed after 2", "resumed after 3"])
def test_a_sound_run_goes_on_and_is_no_longer_watched(found, case):
    assert found[case]["stopped"] is None
    assert found[case]["watching"] == 0


def test_an_expert_without_tokens_is_not_dead(found):
    assert 0 in found["healthy"]["load"]
    assert found["idle expert detached"]["stopped"] is None


def test_an_expert_whose_tokens_have_no_gradient_is_not_dead(found):
    # In the last layer the second and third token have no part in the loss of the first.
    case = found["one token supervised"]
    assert sum(load > 0 for load in case["last"]) > TINY_CONFIG["num_experts_per_tok"]
    assert case["stopped"] is None


def test_an_expert_with_tokens_is_dead_by_name(found):
    message = found["busy expert detached"]["stopped"]
    assert message.startswith("after step 1 1 of 42 adapter matrices have learned nothing")
    assert f"{FC1}.linear_out.weight of expert {found['busy']}" in message


def test_experts_that_no_gradient_reaches_are_dead_where_they_have_tokens(found):
    message = found["experts cut off"]["stopped"]
    busy = [expert for expert, load in enumerate(found["healthy"]["load"]) if load]
    assert message.startswith(f"after step 1 {len(busy)} of 42 adapter matrices")
    assert all(f"{FC1}.linear_out.weight of expert {expert}" in message for expert in busy)


def test_an_a_that_the_optimizer_does_not_have_is_dead_by_step_3(found):
    message = found["not in the optimizer"]["stopped"]
    assert message.startswith("after step 3 1 of 84 adapter matrices")
    assert "layers.3.self_attention.linear_proj.adapter.linear_in.weight" in message


def test_a_resumed_run_is_still_watched(found):
    message = found["resumed after 2, detached"]["stopped"]
    assert message.startswith("after step 3")
    assert f"{FC1}.linear_in.weight of expert {found['busy']}" in message
