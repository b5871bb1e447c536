"""A merged NeMo checkpoint is a base like any other: a run on it is the run on the import of the merged folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conversion.certify import verify
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from data_prep.packing import build_packs
from finetune.settings import LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.conversion.test_merge import write_adapter
from tests.conversion.test_merge_nemo import randomize
from tests.helpers.rank_server import done_by
from tests.helpers.tiny import MTP_CONFIG, TINY_CONFIG, tiny_hf_folder
from tests.helpers.tiny_run import metrics, run, write_run
from tests.helpers.tiny_store import tiny_store

pytestmark = pytest.mark.full


def test_training_starts_from_a_merged_nemo_checkpoint_on_any_layout(tmp_path: Path):
    """Two ranks with EP=2 and with TP=2: loss and gradient norm of every step are those from the imported folder.

    The base has a head of multi-token prediction, which the checkpoint carries and training leaves alone.
    """
    base = tiny_hf_folder(tmp_path / "base", dtypes={"": "F32"}, **MTP_CONFIG)
    write_adapter(tmp_path / "adapter", randomize, config=TINY_CONFIG | MTP_CONFIG)
    done_by("conversion.merge_lora", base, tmp_path / "adapter", tmp_path / "merged", "--nemo")
    assert verify(tmp_path / "merged", base) == []
    assert "Nano3Model" in (tmp_path / "merged/context/model.yaml").read_text()
    assert (tmp_path / "merged/context/io.json").is_file()
    merge(base, tmp_path / "adapter", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "imported", context=False)
    tiny_store(tmp_path / "store", documents=40, longest=30, vocab_size=128, tokenizer=tokenizer_sha256(base))
    build_packs(TokenStore(tmp_path / "store"), 64)
    settings = Settings(
        layout=Layout(ep=2),
        lora=LoraSettings(rank=4, alpha=8.0),
        train=TrainSettings(steps=2, warmup=1, lr=1e-2, global_batch=4, seq_length=64),
        log=LogSettings(tensorboard=False, wandb="off"),
    )
    found = {}
    for layout in (Layout(ep=2), Layout(tp=2)):
        for source in ("imported", "merged"):
            (tmp_path / "nemo").unlink(missing_ok=True)
            (tmp_path / "nemo").symlink_to(tmp_path / source)
            out = run(write_run(tmp_path, f"{source}-{layout.tp}", 2, replace(settings, layout=layout)))
            found[source] = [(row["loss"], row["grad_norm"]) for row in metrics(out)]
            recorded = json.loads((out / "adapter/lora.json").read_text())["base_sha256"]
            assert recorded == json.loads((tmp_path / "merged/base.json").read_text())["sha256"]
        assert len(found["merged"]) == 2
        assert found["merged"] == found["imported"]
