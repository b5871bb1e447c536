"""The real 30B model, every rank of a layout, on the meta device: nothing is missing and nothing is there twice."""

import json
import subprocess
import sys

import pytest

PARAMETERS = 31_577_937_344
ROUTER_BIASES = 2_944
LAYOUTS = ["1", "8,ep=8", "4,tp=2,ep=2,pp=2", "3,pp=3", "5,pp=5", "4,tp=4,ep=4"]


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, list[int]]]:
    command = [sys.executable, "-m", "tests.meta_probe", "nano", *LAYOUTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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
