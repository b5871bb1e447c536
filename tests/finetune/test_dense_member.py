"""A dense member of the family, from a Hugging Face folder to a certified merge, trained on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conversion.certify import verify
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from conversion.quantize_fp8 import main as quantize
from data_prep.packing import build_packs
from evaluation.hf_model import load_reference
from finetune.settings import LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.cli import UserError
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.helpers.tiny import DENSE, tiny_hf_folder
from tests.helpers.tiny_run import metrics, run, write_run
from tests.helpers.tiny_store import tiny_store

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` and `nemo`, the base; `tuned`, a run of 12 steps with TP=2 on eight documents; `merged`, what came of it."""
    folder = tmp_path_factory.mktemp("dense")
    base = tiny_hf_folder(folder / "hf", dtypes={"": "F32"}, **DENSE)
    convert(base, folder / "nemo", context=False)
    tiny_store(folder / "store", documents=8, longest=30, vocab_size=128, tokenizer=tokenizer_sha256(base))
    build_packs(TokenStore(folder / "store"), 64)
    settings = Settings(
        layout=Layout(tp=2),
        lora=LoraSettings(rank=4, alpha=8.0),
        train=TrainSettings(steps=12, warmup=1, lr=3e-2, global_batch=2, seq_length=64, validate_every=12),
        log=LogSettings(tensorboard=False, wandb="off"),
    )
    run(write_run(folder, "tuned", 2, settings, validate=True))
    merge(base, folder / "tuned" / "adapter", folder / "merged")
    return folder


def test_it_learns_and_reports_no_expert(folder: Path):
    rows = metrics(folder / "tuned")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
    assert not [name for row in rows for name in row if "expert" in name]
    recorded = json.loads((folder / "tuned" / "adapter" / "lora.json").read_text())
    assert recorded["router"] == "frozen"
    assert recorded["base_config"]["hybrid_override_pattern"] == DENSE["hybrid_override_pattern"]


def test_its_merge_is_certified_and_is_what_was_trained(folder: Path):
    """Plain transformers finds the loss that two ranks found when they validated after the last step."""
    assert verify(folder / "merged", folder / "hf") == []
    found = mean_loss(folder / "merged", TokenStore(folder / "store"))
    validated = [row["validation_loss"] for row in metrics(folder / "tuned") if "validation_loss" in row]
    assert found == pytest.approx(validated[-1], abs=1e-5)


def mean_loss(model: Path, store: TokenStore) -> float:
    """Over all supervised tokens of the store."""
    reference, total, count = load_reference(model, torch.float32), 0.0, 0
    with torch.no_grad():
        for number in range(len(store)):
            tokens, mask = (torch.tensor(part) for part in store.document(number)[:2])
            logprobs = reference(tokens[None].long()).logits[0, :-1].log_softmax(-1)
            chosen = -logprobs.gather(1, tokens[1:, None].long())[:, 0]
            total, count = total + float((chosen * mask[1:]).sum()), count + int(mask[1:].sum())
    return total / count


def test_its_fp8_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["quantize_fp8.py", str(folder / "merged"), str(folder / "fp8"), "--dry-run"])
    with pytest.raises(
        UserError, match="is a dense member of the family: the published FP8 recipe is of the model with"
    ):
        quantize()
