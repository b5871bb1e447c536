"""The loss in chunks is the loss: by hand, for every size of a chunk, and with no more logits than a chunk has."""

from __future__ import annotations

import json
from math import log
from typing import Any

import pytest

from tests.helpers.probes import made_by

TOKENS = 64
CHUNKS = (0, 1, 20, 63, 64, 1000)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("chunked") / "out.json"
    return json.loads(made_by("chunked_loss_probe", out).read_text())


def test_losses_and_gradients_are_what_one_can_work_out_by_hand(found):
    """Probabilities 3/4 and 1/4 twice, then 1/2 and 1/2; labels 0, 1, 1."""
    made = found["by hand"]
    assert made["losses"][0] == pytest.approx([log(4 / 3), log(4), log(2)], abs=1e-15)
    assert made["gradient"] == pytest.approx([3 / 4 - 1, 3 / 4, 1 / 2], abs=1e-15)
    assert made["same"]  # without a gradient the same losses


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_size_of_a_chunk_gives_the_plain_cross_entropy(found, chunk):
    """FP64, weights of every size on the tokens, 120 of 128 rows of the vocabulary real."""
    made = found["chunks"][str(chunk)]
    assert made["losses"] < 1e-12
    assert made["gradients"] < 1e-12


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_tensor_has_the_logits_of_more_positions_than_a_chunk(found, chunk):
    """Of all tensors that forward and backward pass make, on whatever way."""
    assert found["chunks"][str(chunk)]["rows"] == min(chunk or TOKENS, TOKENS)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_an_evaluation_is_the_same(found, chunk):
    made = found["chunks"][str(chunk)]
    assert made["judged"] is True
    assert made["evaluated"] < 1e-12
    assert made["logits"] == 0  # without labels there is no loss, and the logits are whole


def test_tensor_parallel_without_sequence_parallel(found):
    assert found["without sequence parallel"]["holds"]
    assert found["without sequence parallel"]["gradient"] < 1e-9


def test_an_output_layer_that_learns_is_refused(found):
    assert "train.loss_chunk computes no gradient for the output layer" in found["refused"]
