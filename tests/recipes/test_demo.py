"""The demo's data and its verdict; the whole demo runs in CI as `make demo`."""

import json

import pytest

from finetune.whole_path import broken_promises
from recipes.demo import prepare_data

GOOD = {
    "router_unchanged": True,
    "gain": 0.30,
    "ci95_gain": [0.151, 0.4],
    "merged_accuracy": 0.5,
    "fp8_accuracy": 0.45,
    "ci95_tuned": [0.4, 0.6],
    "ci95_merged": [0.45, 0.55],
    "fp8": {"problems": []},
}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"gain": 0.29, "ci95_gain": [0.2, 0.4]}, ["gain"]),
        ({"ci95_gain": [0.15, 0.4]}, ["lower end"]),
        ({"router_unchanged": False, "gain": 0.1, "ci95_gain": [0.0, 0.2]}, ["router", "gain", "lower end"]),
        ({"merged_accuracy": 0.61}, ["merged model's accuracy"]),
        ({"merged_accuracy": 0.39}, ["merged model's accuracy"]),
        ({"fp8_accuracy": 0.449}, ["FP8 model's accuracy"]),
        ({"fp8_accuracy": 0.551}, ["FP8 model's accuracy"]),
        ({"fp8": {"problems": ["vLLM: lm_head would be read as FP8"]}}, ["every reader"]),
    ],
)
def test_a_demo_that_breaks_its_promise_fails(change, broken):
    found = broken_promises({**GOOD, **change})
    assert len(found) == len(broken)
    assert all(word in promise for word, promise in zip(broken, found, strict=True))


def test_no_held_out_question_is_trained_on(tmp_path):
    assert prepare_data(tmp_path, held_out=20, training=40, old_training=30) == {"exact": 0, "near": 0}
    questions = {
        name: {json.loads(line)["messages"][0]["content"] for line in (tmp_path / f"{name}.jsonl").open()}
        for name in ("held_out", "old_tasks", "train")
    }
    assert len(questions["held_out"]) == 20
    assert not questions["train"] & (questions["held_out"] | questions["old_tasks"])
    assert all("Sort these numbers in ascending order" in question for question in questions["held_out"])
    assert all(8 <= question.count(",") + 1 <= 10 for question in questions["held_out"])
