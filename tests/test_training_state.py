"""What of a run's state belongs to no parameter: Adam's step in either style, random numbers of another layout."""

import json
from typing import Any

import pytest

from tests.probes import made_by

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("training-state") / "out.json"
    return json.loads(made_by("training_state_probe", out, NANO3_CPU="1").read_text())


@pytest.mark.parametrize("style", ["by parameter", "by group"])
def test_adams_step_is_one_number(probe, style):
    """torch's Adam counts by parameter, Transformer Engine's by group: a checkpoint of either sets either."""
    found = probe[style]
    assert (found["none"], found["taken"], found["set"]) == (None, 3, 3)
    assert "different numbers of steps: {2, 3}" in found["different"]


def test_new_random_numbers_follow_seed_and_step_and_agree_where_ranks_must(probe):
    draws = probe["draws"]
    (common, own), other_rank = draws["first"], draws["other rank"]
    assert draws["again"] == [common, own]
    assert other_rank[0] == common
    assert other_rank[1] != own
    for other in ("other step", "other seed"):
        assert draws[other][0] != common
        assert draws[other][1] != own
