"""What model_card.md says: base, steps, settings and training of the adapter, FP8 by family, licence; nothing more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conversion.certificates.certificate import Claim, write_certificate
from conversion.certificates.certificate_json import read_certificate
from conversion.certificates.model_card import model_card
from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.tensor_digests import Fact, facts_of
from conversion.merge_lora import merge
from finetune.settings import LoraSettings, Run, Settings
from tests.conversion.test_merge import write_adapter
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_store import tiny_store

COMMIT = "2d59de1cbd51c0adf384eb906b766d1aee0e0517"
README = "---\nlicense: other\nlicense_name: some-terms\nlicense_link: https://x/y\ntags:\n- z\n---\n# The base\n"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base out of Hugging Face's cache, and an adapter in the folder of its run."""
    folder = tmp_path_factory.mktemp("card")
    base = tiny_hf_folder(folder / f"models--nvidia--A-Model/snapshots/{COMMIT}")
    (base / "README.md").write_text(README)
    store = tiny_store(folder / "sorting", 5, 8, 128)
    write_adapter(folder / "run/adapter", steps=1200)
    settings = Settings(lora=LoraSettings(init_from="secret/adapter"))
    run = Run("secret/model", "secret/base", str(store), None, "secret/out", 1, 2, True, settings)
    (folder / "run/run.json").write_text(run.to_json())
    merge(base, folder / "run/adapter", folder / "merged")
    return folder / "merged"


def test_the_card_of_a_merge(merged):
    card = (merged / "model_card.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["license"], head["license_name"]) == ("other", "some-terms")
    assert head["base_model"] == "nvidia/A-Model"
    assert head["tags"] == ["nemotron_h", "lora"]
    said = read_certificate(merged)
    for words in (
        "# nvidia/A-Model with a LoRA adapter merged in",
        f"`{COMMIT}` (from Hugging Face cache)",
        said["base"]["sha256"],
        said["output"]["sha256"],
        f"SHA-256 `{said['adapter']['sha256']}`; rank 4, alpha 8.0",
        "- router: unchanged",
        "- trained for 1,200 steps",
        "- data: sorting, 5 documents",
        "from random",
        "lr 0.0001",
        "certify.py verify DIR --against BASE",
        "A derivative of nvidia/A-Model: the licence of that model applies",
        "`license_name: some-terms`",
    ):
        assert words in card, words
    assert "secret" not in card + json.dumps(said)  # no path of the machine that trained
    assert card == model_card(said, README)


def test_an_adapter_without_its_run_and_a_base_without_marks_say_so(tmp_path):
    base = tiny_hf_folder(tmp_path / "base")
    merge(base, write_adapter(tmp_path / "adapter"), tmp_path / "merged")
    card = (tmp_path / "merged/model_card.md").read_text()
    assert "unknown, nothing in its folder says it: the content hash names it" in card
    assert "- data:" not in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in head
    assert head["license"] == "other"


def test_the_card_of_a_quantized_merge_shows_what_is_fp8(merged, tmp_path):
    """Layer 1's experts become FP8 and layer 4's stay."""
    with HFFolder(merged) as hf:
        before = facts_of(hf)
    chosen = [name for name in before if ".layers.1.mixer.experts." in name and name.endswith("up_proj.weight")]
    after = before | {name: Fact("F8_E4M3", before[name].shape, "0") for name in chosen}
    changes = {name: {"scale": 0.5, "relative_error": 0.025} for name in chosen}
    facts = {"calibration": {"selection": [], "kv_cache": True, "tokens": 4096}}
    said = write_certificate(tmp_path, merged, before, after, Claim("quantization", changes, facts))
    card = model_card(said)
    assert "# nvidia/A-Model in selective FP8" in card
    assert "## Step 1: a LoRA adapter merged in" in card
    assert "## Step 2: quantized to FP8" in card
    assert "KV cache FP8" in card
    assert "calibrated on 4,096 tokens" in card
    assert "2.50e-02 to 2.50e-02" in card
    assert "| `mixer.experts.*.up_proj.weight` | 8 | 8 | 4 |" in card
    assert "| `mixer.experts.*.down_proj.weight` | 0 | 16 | 1, 4 |" in card
    assert "| `lm_head.weight` | 0 | 1 |  |" in card
