"""What of a run's state belongs to no parameter: Adam's step in either style, random numbers of another layout."""

import json
from typing import Any

import pytest

from tests.helpers.probes import made_by

pytestmark = pytest.mark.full
SHARES = ("whole", "part", "experts", "expert slices")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("training-state") / "out.json"
    return json.loads(made_by("training_state_probe", out).read_text())


@pytest.mark.parametrize("style", ["by parameter", "by group"])
def test_adams_step_is_one_number(probe, style):
    """torch's Adam counts by parameter, Transformer Engine's by group: a checkpoint of either sets either."""
    found = probe[style]
    assert (found["none"], found["taken"], found["set"]) == (None, 3, 3)
    assert "different numbers of steps: {2, 3}" in found["different"]


def test_dropout_follows_seed_and_step_and_agrees_where_ranks_must(probe):
    draws = probe["draws"]
    first = dict(zip(SHARES, draws["first"], strict=True))
    assert draws["again"] == draws["first"]
    assert len({tuple(numbers) for numbers in draws["first"]}) == len(SHARES)
    for other, agrees in (("other rank", {"whole", "experts"}), ("other step", set()), ("other seed", set())):
        found = dict(zip(SHARES, draws[other], strict=True))
        assert {share for share in SHARES if found[share] == first[share]} == agrees, other
