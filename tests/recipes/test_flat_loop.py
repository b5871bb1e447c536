"""The flat loop and the NeMo 2 recipe are the same run: equal losses, equal gradients, an adapter that merges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conversion.adapters.lora_json import read_lora_json
from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from finetune.recipe_file import keep, recipe_of
from finetune.settings import LogSettings, LoraSettings, Run, Settings, StageSettings, TrainSettings
from launch.plan.layout import Layout
from nano3.cli import UserError
from nano3.token_store import TokenStore, tokenizer_sha256
from recipes.flat_loop import flat_loop
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, write_run
from tests.helpers.tiny_store import tiny_store

STEPS = 4
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    source = tiny_hf_folder(folder / "hf", dtypes={"": "F32"})
    convert(source, folder / "nemo", context=False)
    tiny_store(folder / "store", documents=60, longest=30, vocab_size=128, tokenizer=tokenizer_sha256(source))
    build_packs(TokenStore(folder / "store"), 64)
    return folder


@pytest.mark.parametrize(
    ("name", "world", "layout"),
    [
        ("one", 1, Layout()),
        pytest.param("experts", 2, Layout(ep=2), marks=pytest.mark.full),
        pytest.param("tensor", 2, Layout(tp=2), marks=pytest.mark.full),
    ],
)
def test_the_losses_are_those_of_the_recipe(folder, ranks, name, world, layout):
    settings = Settings(
        layout=layout,
        lora=LoraSettings(rank=4, alpha=8.0),
        train=TrainSettings(steps=STEPS, warmup=1, lr=1e-2, global_batch=4, seq_length=64),
        log=LogSettings(tensorboard=False, wandb="off"),
    )
    path = write_run(folder, f"nemo-{name}", world, settings)
    assert ranks.run(path) == [0] * world
    theirs = Run.from_json(path.read_text())
    flat = replace(theirs, out=str(folder / f"flat-{name}"), recipe=recipe_of(flat_loop))
    keep(flat.recipe, Path(flat.out))
    (folder / f"flat-{name}.json").write_text(flat.to_json())
    assert ranks.run(folder / f"flat-{name}.json") == [0] * world
    ours, rows = metrics(Path(flat.out)), [row for row in metrics(Path(theirs.out)) if "loss" in row]
    assert len(ours) == len(rows) == STEPS
    for mine, row in zip(ours, rows, strict=True):
        assert mine["step"] == row["step"]
        for key in ("loss", "lr", "grad_norm"):
            assert mine[key] == pytest.approx(row[key], rel=TOLERANCE), (mine["step"], key)
    assert ours[0]["loss"] != ours[-1]["loss"]
    # The same adapter, and the same words about it.
    written, expected = (TorchDistReader(Path(run.out) / "adapter" / "weights") for run in (flat, theirs))
    assert written.shapes == expected.shapes
    infos = [json.loads((Path(run.out) / "adapter" / "lora.json").read_text()) for run in (flat, theirs)]
    assert infos[0] == infos[1]
    assert read_lora_json(Path(flat.out) / "adapter").rank == 4


@pytest.mark.parametrize(
    "change",
    [
        {"layout": Layout(pp=2)},
        {"router": "balance"},
        {"lora": LoraSettings(dora=True)},
        {"lora": LoraSettings(base="nf4")},
        {"stages": StageSettings(weights="fixed")},
    ],
)
def test_what_the_flat_loop_has_not_is_refused(change):
    with pytest.raises(UserError, match=r"^pp, .*balance, .*NF4, DoRA, .* see nemotron_lora\.py"):
        flat_loop(Run("", "", "", None, "", 1, 2, True, replace(Settings(), **change)))
