"""recipes/reasoning_lora.py: its chains of thought, its mixture, its report. The demo is `make reasoning-demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.packing import PackedDataset
from finetune.scoring import reasoning_report
from nano3.arch import resolve_model
from nano3.hf_config import read_config
from nano3.mixture import read_mixture
from nano3.pack_index import Curriculum
from nano3.rows import write_rows
from nano3.token_store import TokenStore
from pico.reasoning import filtering_chain, sorting_chain
from recipes.reasoning_lora import BLOCKS, WEIGHTS, pico_settings, prepare_data, settings
from tests.conversion.test_merge import write_adapter


def test_chains_are_written_by_rule():
    asked = "Sort these numbers in ascending order: 14, 10, 30, 2, 14"
    assert sorting_chain(asked, "2, 10, 14, 14, 30") == "0: 2; 10: 14, 10, 14; 30: 30"
    asked = "Keep all numbers larger than 38 in this list: 29, 44, 37, 44"
    assert filtering_chain(asked, "44, 44") == "29 no, 44 yes, 37 no, 44 yes"


def test_the_mixture_has_weights_a_curriculum_and_nothing_that_is_scored(tmp_path: Path):
    prepare_data(tmp_path, held_out=12, training=60)
    rows = {path.stem: list(map(json.loads, path.open())) for path in tmp_path.glob("*.jsonl")}
    assert {name: len(part) for name, part in rows.items() if name in (*WEIGHTS, "held_out")} == {
        "sort": 27, "filter": 21, "old": 12, "held_out": 12
    }  # fmt: skip
    scored = {row["messages"][0]["content"] for name in ("held_out", "old_tasks") for row in rows[name]}
    trained = [row for name in WEIGHTS for row in rows[name]]
    assert not scored & {row["messages"][0]["content"] for row in trained}
    assert {"reasoning_content" in row["messages"][1] for row in rows["sort"] + rows["filter"]} == {True}
    assert {"reasoning_content" in row["messages"][1] for row in rows["old"]} == {False}
    mixture = read_mixture(tmp_path / "mixture.yaml")
    assert [(store.name, float(amount)) for store, amount in zip(mixture.stores, mixture.amounts, strict=True)] == [
        *WEIGHTS.items()
    ]
    assert mixture.curriculum == Curriculum("length", BLOCKS)
    for store in mixture.stores:
        packs = PackedDataset(store, 1024, 1, mixture.curriculum)
        lengths = TokenStore(store).lengths()
        first, last = packs.documents(0), packs.documents(len(packs) - 1)
        assert lengths[first].max() <= lengths[last].min()  # short chains first


def test_the_recipe_stays_within_what_public_projects_take():
    one = settings()
    assert 8 <= one.lora.rank <= one.lora.max_rank == 64
    assert 1e-5 <= one.train.lr <= 1e-4
    assert pico_settings().lora.max_rank == 64


def test_an_adapter_that_changes_nothing_gains_nothing_and_forgets_nothing(tmp_path: Path):
    """The base is asked with thinking and without; the gain is over the better of the two."""
    said = {"role": "assistant", "content": "3, 5", "reasoning_content": "0: 5, 3"}
    asked = {"role": "user", "content": "Sort these numbers in ascending order: 5, 3"}
    write_rows(tmp_path / "held_out.jsonl", [{"id": "1", "source": "sort", "messages": [asked, said]}])
    plain = {"role": "assistant", "content": "3, 4, 7"}
    asked = {"role": "user", "content": "Sort these numbers in ascending order: 7, 3, 4"}
    write_rows(tmp_path / "old_tasks.jsonl", [{"id": "2", "source": "old", "messages": [asked, plain]}])
    adapter = write_adapter(tmp_path / "adapter", config=dict(read_config(resolve_model("pico"))))  # B is zero
    report = reasoning_report(resolve_model("pico"), adapter, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["tuned_accuracy"] == report["base_thinking"] == 0.0  # it never learned to think
    assert report["gain"] == pytest.approx(-max(report["base_thinking"], report["base_plain"]))
    assert report["forgetting"]["old"]["base"] == report["forgetting"]["old"]["tuned"]
