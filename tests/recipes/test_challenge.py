"""recipes/challenge_lora.py: its data, settings, refusals. The whole demo is `make challenge-demo`, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conversion.adapters.lora_json import parse_lora_json
from conversion.adapters.peft_names import check_consumer
from finetune.command import has_data, parser, resolve
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError
from nano3.targets import PRESETS
from nano3.token_store import TokenStore
from recipes.challenge_lora import pico_settings, prepare_data, settings
from tests.conversion.test_merge import FORMAT_2


def test_no_held_out_puzzle_is_trained_on_and_the_reasoning_is(tmp_path: Path):
    prepare_data(tmp_path, "challenge/numerals", level=0, held_out=12, training=24)
    rows = {name: list(map(json.loads, (tmp_path / f"{name}.jsonl").open())) for name in ("held_out", "train")}
    questions = {name: {row["messages"][0]["content"] for row in part} for name, part in rows.items()}
    assert (len(questions["held_out"]), len(questions["train"])) == (12, 24)
    assert not questions["held_out"] & questions["train"]
    for row in rows["train"]:
        said = row["messages"][1]
        assert said["content"] == f"\\boxed{{{row['answer']}}}"
        assert said["reasoning_content"].endswith(f" is {row['answer']}")
    store = TokenStore(tmp_path / "train")
    assert store.manifest["supervised_tokens"] > 24 * 60  # the reasoning counts, not the box alone


@pytest.mark.parametrize("of_recipe", [settings, pico_settings])
def test_what_it_trains_vllm_and_peft_load(of_recipe):
    lora = of_recipe().lora
    assert (lora.rank, lora.max_rank) == (32, 32)
    arch = Arch.load(resolve_model("nano"))
    facts = {**FORMAT_2, "rank": 32, "alpha": 32.0, "targets": list(PRESETS[lora.preset]), "experts": lora.experts}
    info = parse_lora_json({**facts, "base_config": {}}, "lora.json")
    for consumer in ("vllm", "peft"):
        check_consumer(consumer, arch, info, lora.adapters(arch))


def test_a_higher_rank_is_refused_before_anything_starts(tmp_path: Path):
    arguments = ["--model", "pico", "--local", "--out", str(tmp_path / "out"), "lora.rank=64"]
    with pytest.raises(UserError, match=r"rank 64 of \S+ is above lora\.max_rank=32"):
        resolve(parser().parse_args(arguments), settings)


def test_with_data_it_is_a_recipe_and_else_a_demo(monkeypatch: pytest.MonkeyPatch):
    for words, expected in ((["--data=store"], True), (["--help-settings"], True), (["--kind", "bits"], False)):
        monkeypatch.setattr("sys.argv", ["challenge_lora.py", *words])
        assert has_data() == expected
