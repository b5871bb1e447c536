"""The loss is the weighted mean over the supervised tokens of the global batch, however packed, split and spread."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conversion.hf_to_nemo import convert
from data_prep.packing import PackedDataset, build_packs
from data_prep.prepare import prepare
from finetune.settings import LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from tests.helpers.data_fixtures import write_jsonl, write_tokenizer
from tests.helpers.rank_server import RankServer
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, write_run
from tests.helpers.token_reference import SOURCES, weighted_store

DOCUMENTS, LENGTH = 32, 16
SPREADS = {
    "accumulation 1, 1 rank": (512, 1),
    "accumulation 1, 2 ranks": (256, 2),
    "accumulation 1, 4 ranks": (128, 4),
    "accumulation 2, 1 rank": (256, 1),
    "accumulation 2, 2 ranks": (128, 2),
    "accumulation 2, 4 ranks": (64, 4),
    "accumulation 8, 1 rank": (64, 1),
    "accumulation 8, 2 ranks": (32, 2),
    "accumulation 8, 4 ranks": (16, 4),
}
"""Sequence length and ranks: the same documents in 1, 2, 4, 8, 16 and 32 packs of one global batch."""


@pytest.mark.full
def test_the_same_documents_have_the_same_loss(tmp_path, ranks):
    """Weights of 0.3 to 2, two sources, and documents with 1 to 13 supervised tokens each."""
    convert(tiny_hf_folder(tmp_path / "hf", dtypes={"": "F32"}), tmp_path / "nemo", context=False)
    documents, rows = weighted_store(tmp_path / "store", DOCUMENTS, LENGTH, LENGTH), {}
    for spread, (seq_length, world) in SPREADS.items():
        packs = build_packs(documents, seq_length)["packs"]
        assert packs == DOCUMENTS * LENGTH // seq_length  # every packing is full
        rows[spread] = first_step(tmp_path, spread.replace(" ", "-"), world, packs, seq_length, ranks)
    assert rows.keys() == SPREADS.keys()
    for name in ("loss", *(f"loss/{source}" for source in SOURCES)):
        losses = [row[name] for row in rows.values()]
        assert max(losses) - min(losses) < 1e-6 * min(losses), (name, losses)
    norms = [row["grad_norm"] for row in rows.values()]
    assert max(norms) - min(norms) < 1e-5 * min(norms), rows
    assert {row["tokens"] for row in rows.values()} == {DOCUMENTS * LENGTH}


def first_step(folder: Path, name: str, world: int, packs: int, seq_length: int, ranks: RankServer) -> dict:
    """The metrics of the one step that such a run takes."""
    settings = Settings(
        layout=Layout(ep=2 if world > 1 else 1),
        lora=LoraSettings(rank=4),
        train=TrainSettings(steps=1, warmup=0, global_batch=packs, seq_length=seq_length),
        log=LogSettings(tensorboard=False, wandb="off"),
    )
    assert ranks.run(write_run(folder, name, world, settings)) == [0] * world, name
    return metrics(folder / name)[0]


@pytest.mark.full
def test_the_weight_of_a_span_reaches_the_loss(tmp_path):
    """By hand: "abcd" and its end, "bc" at half weight and "d" at none, with losses 1, 10, 100, 1000 and 10000."""
    from finetune.packed_data import collate  # with it comes NeMo
    from nano3.loss import LOSS, TOKENS, WEIGHT, TokenLoss, mean_loss

    answer = {"role": "assistant", "content": "abcd"}
    answer["spans"] = [{"text": "bc", "weight": 0.5, "stage": 7}, {"text": "d", "weight": 0}]
    rows = [{"messages": [{"role": "user", "content": "q"}, answer]}]
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    store, _ = prepare([write_jsonl(tmp_path / "x.jsonl", rows)], tokenizer, tmp_path / "store", 128)
    batch = collate([PackedDataset(tmp_path / "store", 128)[0]], np.array([0, -1]))
    positions = len(store.document(0)[0]) - 1
    losses = torch.zeros(1, 128)
    losses[0, positions - 6 : positions - 1] = torch.tensor([1.0, 10, 100, 1000, 10000])
    loss = TokenLoss(sources=1, validation=False)
    total, supervised, _ = loss.forward(batch, losses)
    assert total == 1 + 0.5 * (10 + 100) + 10000
    assert supervised == 4, "a token of weight 0 is not supervised"
    assert loss.sums[0, [LOSS, WEIGHT, TOKENS]].tolist() == [10056, 1 + 0.5 + 0.5 + 1, 4]
    assert mean_loss(loss.sums) == 10056 / 3
