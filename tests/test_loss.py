"""The loss is the mean over the supervised tokens of the global batch, however they are packed, split and spread."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from data_prep.store import StoreWriter
from launch.layout import Layout
from nano3.cli import fresh_output
from nano3.token_store import KIND, TokenStore
from recipes.settings import LogSettings, LoraSettings, Settings, TrainSettings
from tests.tiny import tiny_hf_folder
from tests.tiny_run import metrics, run, write_run

DOCUMENTS, LENGTH = 32, 16
SPREADS = {
    "8 packs, 1 rank": (64, 1),
    "4 packs, 1 rank": (128, 1),
    "1 pack, 1 rank": (512, 1),
    "4 packs, 2 ranks": (128, 2),
    "8 packs, 4 ranks": (64, 4),
}
"""Sequence length and ranks: 3 packings of the same documents; 8, 4, 1, 2 and 2 micro batches on 1, 2 and 4 ranks."""


def store(path: Path) -> TokenStore:
    """Documents of one length, so that every packing is full; document i has i % 13 + 1 supervised tokens."""
    rng = np.random.default_rng(0)
    with fresh_output(path, KIND) as folder:
        writer = StoreWriter(folder)
        for number in range(DOCUMENTS):
            mask = np.zeros(LENGTH + 1, dtype=np.uint8)
            mask[-(number % 13 + 1) :] = 1
            writer.add(rng.integers(3, 128, LENGTH + 1), mask, "random")
        writer.finish(SimpleNamespace(sha256="none", vocab_size=128))  # type: ignore[arg-type]
    return TokenStore(path)


@pytest.mark.full
def test_the_same_documents_have_the_same_loss(tmp_path):
    convert(tiny_hf_folder(tmp_path / "hf", dtypes={"": "F32"}), tmp_path / "nemo", context=False)
    documents, rows = store(tmp_path / "store"), {}
    for spread, (seq_length, ranks) in SPREADS.items():
        packs = build_packs(documents, seq_length)["packs"]
        assert packs == DOCUMENTS * LENGTH // seq_length
        settings = Settings(
            layout=Layout(ep=2 if ranks > 1 else 1),
            lora=LoraSettings(rank=4),
            train=TrainSettings(steps=1, warmup=0, global_batch=packs, seq_length=seq_length),
            log=LogSettings(tensorboard=False),
        )
        rows[spread] = metrics(run(write_run(tmp_path, spread.replace(" ", "-"), ranks, settings)))[0]
    losses = [row["loss"] for row in rows.values()]
    assert max(losses) - min(losses) < 1e-6 * min(losses), rows
    norms = [row["grad_norm"] for row in rows.values()]
    assert max(norms) - min(norms) < 1e-5 * min(norms), rows
    assert {row["tokens"] for row in rows.values()} == {DOCUMENTS * LENGTH}
