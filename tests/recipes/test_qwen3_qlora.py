"""The Qwen3 recipe from rows to an adapter on a CPU: a tiny random Qwen3 with the real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_prep.packing import PackedDataset
from data_prep.prepare import prepare
from finetune import plain_model
from nano3.cli import UserError
from nano3.rows import write_rows
from recipes import qwen3_qlora
from tests.helpers.real_tokenizers import qwen3_folder

pytestmark = pytest.mark.full
LENGTH = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qwen3`, the base; stores `train` and `held` of sums."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3")
    base = qwen3_folder(folder / "qwen3")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=151_669, initializer_range=0.1, **sizes, **heads)).save_pretrained(base)
    for name, first in (("train", 0), ("held", 1)):
        rows = [summed(number // 6, number % 6) for number in range(first, 36, 2)]
        write_rows(folder / f"{name}.jsonl", rows)
        prepare([folder / f"{name}.jsonl"], base, folder / name, LENGTH)
    return folder


def summed(a: int, b: int) -> dict:
    answer = {"role": "assistant", "content": f"\\boxed{{{a + b}}}", "reasoning_content": f"{a}+{b} is {a + b}"}
    return {"messages": [{"role": "user", "content": f"What is {a}+{b}?"}, answer]}


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *more: str) -> list[dict]:
    """The rows of metrics.jsonl of a run."""
    named = {"model": "qwen3", "data": "train", "validation": "held", "out": name}
    paths = [word for flag, part in named.items() for word in (f"--{flag}", str(folder / part))]
    numbers = ["--seq-length", str(LENGTH), "--batch", "2", "--epochs", "4", "--lr", "1e-2", "--validate-every", "5"]
    monkeypatch.setattr("sys.argv", ["qwen3_qlora.py", *paths, *numbers, *more])
    assert qwen3_qlora.main() == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_qlora_learns_and_ends_near_lora(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Held-out loss of QLoRA within 5 % of LoRA's from the same start; PEFT's adapter, alpha twice the rank."""
    quantized, plain = trained(folder, monkeypatch, "qlora"), trained(folder, monkeypatch, "lora", "--lora")
    assert quantized[-1]["loss"] < 0.95 * quantized[0]["loss"]
    ends = [[row["validation_loss"] for row in rows if "validation_loss" in row] for rows in (quantized, plain)]
    assert ends[0][-1] == pytest.approx(ends[1][-1], rel=0.05)
    settings = json.loads((folder / "qlora/adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (16, 32)
    assert "lm_head" not in settings["target_modules"]
    assert quantized[0]["loss"] != plain[0]["loss"]  # NF4 is another base


def test_documents_that_see_each_other_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """With a mask of ones transformers takes the pack for one document; without it nothing moves."""
    pack = PackedDataset(folder / "train", LENGTH)[0]
    model = plain_model.load_base(folder / "qwen3", four_bit=False)
    assert plain_model.require_isolation(model, pack) < 1e-6

    def leaking(model, pack):
        tokens, positions = (torch.from_numpy(pack[key])[None] for key in ("tokens", "position_ids"))
        mask = torch.ones_like(tokens)
        return model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]

    monkeypatch.setattr(plain_model, "logits", leaking)
    with pytest.raises(UserError, match="packed documents see each other"):
        plain_model.require_isolation(model, pack)


def test_it_stops_when_nothing_gets_better(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """With a rate of 0 every validation after the first is no better: patience 1 ends the run at the second."""
    rows = trained(folder, monkeypatch, "still", "--lora", "--lr", "0", "--validate-every", "1", "--patience", "1")
    assert len(rows) == 2


def test_a_nemotron_is_sent_to_its_own_recipe():
    with pytest.raises(UserError, match=r"is a Nemotron-H; use recipes/nemotron_lora\.py"):
        plain_model.load_base(Path("nano3/presets/pico"), four_bit=True)
