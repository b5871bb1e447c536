"""recipes/medical_lora.py: its data, its settings and both scorers on a few rows. `make medical-smoke` is by hand."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.forms.said import ANSWER
from evaluation.comparison import by_groups, table
from evaluation.tasks.medmcqa import PUBLISHED
from finetune.scoring import score_both
from nano3.arch import resolve_model
from nano3.hf_config import read_config
from nano3.stage_weights import NAMES
from nano3.token_store import TokenStore
from recipes.medical_lora import NOTE, prepare_data, settings
from tests.conversion.test_merge import write_adapter
from tests.helpers.data_fixtures import write_jsonl

WORDS = ["heart", "lung", "liver", "spleen", "kidney", "brain", "nerve", "muscle", "skin", "bone", "blood", "lymph"]


def questions(path: Path) -> Path:
    """Twelve questions of a word each; `cop` counts from 0."""
    rows = [
        {"question": f"The {word} of number {n} {WORDS[n - 1]}?", "opa": "one", "opb": "two", "opc": "three",
         "opd": "four", "cop": n % 4, "subject_name": ("ENT", "Skin")[n % 2]}
        for n, word in enumerate(WORDS)
    ]  # fmt: skip
    return write_jsonl(path, rows)


def test_an_untrained_adapter_scores_as_the_base_by_both_scorers(tmp_path: Path):
    """Four held out by question, the letters marked; results by subject stand beside the published table."""
    prepare_data(str(questions(tmp_path / "their-validation.jsonl")), tmp_path, held_out=4)
    rows = {name: list(map(json.loads, (tmp_path / f"{name}.jsonl").open())) for name in ("train", "validation")}
    asked = {name: {row["messages"][0]["content"] for row in part} for name, part in rows.items()}
    assert (len(asked["train"]), len(asked["validation"])) == (8, 4)
    assert not asked["train"] & asked["validation"]
    assert TokenStore(tmp_path / "train").stage_counts()[5] == 8
    TokenStore(tmp_path / "train").check_trainable()  # the smoke run's copy of validation rows
    config = dict(read_config(resolve_model("pico")))
    adapter = write_adapter(tmp_path / "adapter", config=config)  # B is zero
    into = tmp_path / "scores"
    base, tuned = score_both(resolve_model("pico"), adapter, tmp_path / "validation.jsonl", "medmcqa", into)
    assert [row["letter_logprobs"] for row in base["answers"]] == [row["letter_logprobs"] for row in tuned["answers"]]
    assert [row["answer"] for row in base["answers"]] == [row["answer"] for row in tuned["answers"]]
    assert {path.name for path in into.iterdir()} == {"scores-base.json", "scores.json"}
    shown = table(by_groups(base, tuned), PUBLISHED)
    assert "published 37.7 -> 62.3" in shown  # ENT: 20 and 33 of 53
    assert "published 29.4 -> 58.8" in shown  # Skin: 5 and 10 of 17


def test_the_published_table_has_the_published_totals():
    assert [sum(counts[i] for counts in PUBLISHED.values()) for i in range(3)] == [4183, 1449, 2582]
    assert (round(100 * 1449 / 4183, 2), round(100 * 2582 / 4183, 2)) == (34.64, 61.73)  # of the four thousand


def test_one_pass_is_206_steps_of_16_packs():
    train = settings().train
    assert (train.global_batch, train.epochs, train.steps) == (16, 1.0, None)
    assert 13_500_000 // (train.global_batch * train.seq_length) == 205
    assert "no medicine" in NOTE


def test_the_loss_on_the_letter_is_reported_apart():
    """Stage 5 is what the letter is in the store, and what the run calls the answer; its weight is that of the rest."""
    stages = settings().stages
    assert NAMES[ANSWER] == "answer"
    assert (stages.weights, stages.fixed) == ("fixed", [1.0] * 5)
