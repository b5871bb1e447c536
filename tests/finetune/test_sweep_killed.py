"""A sweep of eight trials, killed twice, ends with eight results; its best trial is that run alone, bit for bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from finetune.sweep.report import RESULTS
from finetune.sweep.study import Study
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.finetune.test_resume import assert_same
from tests.helpers.rank_server import CPU_ENVIRONMENT, Job, RankServer
from tests.helpers.sweep_probe import NEVER
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics
from tests.helpers.tiny_store import tiny_store

ROOT = Path(__file__).resolve().parents[2]
TRIALS, STEPS = 8, 6
SETTINGS = [
    *("train.seq_length=64", f"train.steps={STEPS}", "train.global_batch=2", "train.warmup=1", "layout.ep=1"),
    *("train.validate_every=2", "lora.dropout=0.2", "checkpoint.every=2", "checkpoint.minutes=0"),
    *("log.tensorboard=false", "log.wandb=off"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its checkpoint, and a store."""
    folder = tmp_path_factory.mktemp("sweep")
    source = tiny_hf_folder(folder / "hf", dtypes={"": "F32"}, hybrid_override_pattern="M*E")
    convert(source, folder / "base", context=False)
    tiny_store(folder / "store", 40, longest=30, vocab_size=128, tokenizer=tokenizer_sha256(source))
    build_packs(TokenStore(folder / "store"), 64)
    return folder


def paths(folder: Path) -> list[str]:
    store = str(folder / "store")
    named = ["--model", str(folder / "hf"), "--base", str(folder / "base"), "--data", store, "--validation", store]
    return [*named, "--local"]


def command(ranks: RankServer, log: Path, when: str, *words: str) -> int:
    """`python WORDS`, killed `when` a trial is so far; the exit code."""
    environment = {**os.environ, **CPU_ENVIRONMENT}
    (code,) = ranks.run_jobs([Job("tests.helpers.sweep_probe", [when, *words], environment, str(log))])
    return code


def sweep(ranks: RankServer, folder: Path, when: str = NEVER) -> int:
    tries = ["--try", "lora.rank=2,4", "--try", "train.lr=1e-5..1e-1:log", "--prune-after", "2", "--seed", "3"]
    words = [*paths(folder), "--out", str(folder / "sweep"), *tries, "--trials", str(TRIALS), *SETTINGS]
    return command(ranks, folder / "sweep.txt", when, str(ROOT / "recipes" / "sweep.py"), *words)


def states(folder: Path) -> list[str]:
    return [one.state.name for one in Study.read(folder / "sweep").trials()]


def test_killed_twice_it_ends_with_eight_results_and_the_best_is_that_run_alone(folder: Path, ranks: RankServer):
    out = folder / "sweep"
    for trial, lines in ((1, 4), (5, 1)):  # in its third step, behind a checkpoint; in its first
        assert sweep(ranks, folder, f"{out}/trials/{trial}/metrics.jsonl:{lines}") == -9, (
            folder / "sweep.txt"
        ).read_text()
        assert states(folder)[trial:] == ["RUNNING"]  # begun, and none behind it
        assert not (out / "trials" / str(trial) / "adapter").exists()
    begun = [one.params for one in Study.read(out).trials()]
    assert sweep(ranks, folder) == 0, (folder / "sweep.txt").read_text()
    # Eight results, each trial begun once: those that were begun before the kills are the same ones.
    ended = states(folder)
    assert len(ended) == TRIALS
    assert ended[:4] == ["COMPLETE"] * 4
    assert {"COMPLETE", "PRUNED"} == set(ended)
    assert [one.params for one in Study.read(out).trials()][:6] == begun
    assert "resuming after step " in (folder / "sweep.txt").read_text()
    found: list[dict[str, Any]] = json.loads((out / RESULTS).read_text())["trials"]
    for row in found:
        steps = [line["step"] for line in metrics(Path(row["folder"])) if "loss" in line]
        assert steps == list(range(1, len(steps) + 1))
        assert (len(steps) < STEPS) == (row["state"] == "given up"), row
    # The best, by the recipe's own command.
    best = Path(found[0]["folder"])
    words = ["--config", str(best / "config.yaml"), "--local", "--out", str(folder / "alone")]
    recipe = str(ROOT / "recipes" / "nemotron_lora.py")
    assert command(ranks, folder / "alone.txt", NEVER, recipe, *words) == 0, (folder / "alone.txt").read_text()
    assert_same(best, folder / "alone")
    assert (
        found[0]["loss"]
        == [row["validation_loss"] for row in metrics(folder / "alone") if "validation_loss" in row][-1]
    )
