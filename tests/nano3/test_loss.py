"""The loss is the weighted mean over the supervised tokens of the global batch, however packed, split and spread."""

from pathlib import Path

import pytest

from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from finetune.settings import LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
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
