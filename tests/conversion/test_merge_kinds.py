"""Merges of other adapters than the plain one: one for each expert, ranks of their own, rsLoRA, DoRA, vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conversion.test_merge import FORMAT_2, HF, LAYER, RANK, check, fill, merged, rows


def test_each_expert_gets_its_own_delta(tmp_path: Path):
    """Expert k of layer 1 gets 2**k on every row of down_proj, of the other module and layer nothing."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAYER.format(1, "mlp.experts.experts.linear_fc2")] += 2.0 ** torch.arange(8)[:, None, None]

    before, after = merged(tmp_path, change, experts="each")
    check(before, after, {HF.format(1, f"experts.{k}.down_proj"): rows((32, 2.0**k)) for k in range(8)})


def test_a_rank_of_its_own_keeps_alpha(tmp_path: Path):
    """Rank 2 on in_proj: alpha / 2 * 2 * A * b = b again, since A is constant; elsewhere nothing."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        assert tensors[LAYER.format(0, "mixer.in_proj") + ".dt"].shape == (8, 2)
        fill(LAYER.format(0, "mixer.in_proj") + ".dt", (8, 3.0))(tensors)

    before, after = merged(tmp_path, change, **{**FORMAT_2, "rank_pattern": ["in_proj:2"]})
    check(before, after, {HF.format(0, "in_proj"): rows((256, 0.0), (8, 3.0))})


def test_rank_stabilized_scale(tmp_path: Path):
    """alpha / sqrt(4) instead of alpha / 4: twice as much."""
    change = fill(LAYER.format(0, "mixer.out_proj"), (32, 1.0))
    before, after = merged(tmp_path, change, **{**FORMAT_2, "rslora": True})
    check(before, after, {HF.format(0, "out_proj"): rows((32, 2.0))})


def test_dora_gives_every_row_its_length(tmp_path: Path):
    """With B zero a row points as it did and is as long as the magnitude: 1, or 3 where that was changed."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["module.decoder.layers.1.mlp.experts.experts.linear_fc1.adapter.magnitude"][5, :10] = 3.0

    before, after = merged(tmp_path, change, **{**FORMAT_2, "dora": True})
    for name, lengths in {
        "experts.5.up_proj": rows((10, 3.0), (14, 1.0)),
        "experts.6.up_proj": rows((24, 1.0)),
    }.items():
        old, new = (tensors[HF.format(1, name)] for tensors in (before, after))
        assert torch.allclose(new.norm(dim=1), lengths)
        assert torch.allclose(new / lengths[:, None], old / old.norm(dim=1, keepdim=True))
    assert torch.equal(after["backbone.embeddings.weight"], before["backbone.embeddings.weight"])


@pytest.mark.parametrize("padding", [0, 128])
def test_embedding_and_output_rows(padding: int, tmp_path: Path):
    """Token 7 gets 1 in the embedding, token 9 gets 2 in lm_head; rows that pad the vocabulary are left out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for module, token, value in (("embedding.word_embeddings", 7, 1.0), ("output_layer", 9, 2.0)):
            key = f"module.{module}.adapter.linear_out.weight"
            tensors[key][token] = value
            tensors[key] = torch.cat([tensors[key], torch.full((padding, RANK), 5.0)])

    before, after = merged(tmp_path, change, targets=("word_embeddings", "output_layer"))
    expected = {
        "backbone.embeddings.weight": rows((7, 0.0), (1, 1.0), (120, 0.0)),
        "lm_head.weight": rows((9, 0.0), (1, 2.0), (118, 0.0)),
    }
    check(before, after, expected)


def test_biases_that_moved_replace_those_of_the_base(tmp_path: Path):
    moved = {layer: torch.arange(8.0) / 100 + layer for layer in (1, 4)}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer, bias in moved.items():
            tensors[f"module.decoder.layers.{layer}.mlp.router.expert_bias"] = bias

    before, after = merged(tmp_path, change, router="balance")
    names = {f"backbone.layers.{layer}.mixer.gate.e_score_correction_bias": bias for layer, bias in moved.items()}
    for name, old in before.items():
        assert torch.equal(after[name], names.get(name, old)), name
