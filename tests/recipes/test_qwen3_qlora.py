"""The Qwen3 recipe on a CPU, from rows to a certified model and its report: a tiny Qwen3 with the real tokenizer.

It starts from random numbers: what it answers does not matter, what becomes of the answers does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.certificates.certificate_json import read_certificate
from conversion.certify import verify
from conversion.merge_lora import merge
from data_prep.packing import PackedDataset
from data_prep.prepare import prepare
from evaluation import evaluate
from evaluation.lineage import lineage, parts_of
from evaluation.models import HFModel, beside
from evaluation.report import report
from evaluation.result_file import read_result
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
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=151_669, initializer_range=0.1, **sizes, **heads))
    model.bfloat16().save_pretrained(base)
    for name, first in (("train", 0), ("held", 1)):
        rows = [summed(number // 6, number % 6) for number in range(first, 36, 2)]
        write_rows(folder / f"{name}.jsonl", rows)
        prepare([folder / f"{name}.jsonl"], base, folder / name, LENGTH)
    return folder


def summed(a: int, b: int) -> dict:
    answer = {"role": "assistant", "content": f"\\boxed{{{a + b}}}", "reasoning_content": f"{a}+{b} is {a + b}"}
    return {"messages": [{"role": "user", "content": f"What is {a}+{b}?"}, answer]}


@pytest.fixture(scope="module")
def qlora(folder: Path) -> list[dict]:
    """The rows of a run in `folder`/qlora that was never killed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return trained(folder, monkeypatch, "qlora")


@pytest.fixture(scope="module")
def merged_summary(folder: Path, qlora: list[dict]) -> str:
    """What the merge into `folder`/qlora/merged says."""
    assert qlora
    return str(merge(folder / "qwen3", folder / "qlora/adapter", folder / "qlora/merged"))


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *more: str) -> list[dict]:
    """The rows of metrics.jsonl of a run."""
    named = {"model": "qwen3", "data": "train", "validation": "held", "out": name}
    paths = [word for flag, part in named.items() for word in (f"--{flag}", str(folder / part))]
    numbers = ["--seq-length", str(LENGTH), "--batch", "2", "--epochs", "3", "--lr", "1e-2", "--validate-every", "5"]
    monkeypatch.setattr("sys.argv", ["qwen3_qlora.py", *paths, *numbers, *more])
    assert qwen3_qlora.main() == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_qlora_learns_and_ends_near_lora(folder: Path, qlora: list[dict], monkeypatch: pytest.MonkeyPatch):
    """Held-out loss of QLoRA within 5 % of LoRA's from the same start; PEFT's adapter, alpha twice the rank."""
    quantized, plain = qlora, trained(folder, monkeypatch, "lora", "--lora")
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


def test_a_killed_run_is_resumed_bit_for_bit(folder: Path, qlora: list[dict], monkeypatch: pytest.MonkeyPatch, capsys):
    """Killed after 7 of 8 steps, when the last checkpoint is of step 5: the same metrics, the same adapter. It is found
    where a kill left it while it was being replaced, too."""
    steps, one_step = [], qwen3_qlora.one_step

    def killed(*args):
        steps.append(1)
        if len(steps) > 7:
            raise KeyboardInterrupt
        return one_step(*args)

    monkeypatch.setattr(qwen3_qlora, "one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, monkeypatch, "killed")
    monkeypatch.setattr(qwen3_qlora, "one_step", one_step)
    assert (folder / "killed/metrics.jsonl").read_text().count("\n") == 7
    with pytest.raises(UserError, match=r"holds another run: lr was 0\.01 and is 0\.02\. Run with what it was"):
        trained(folder, monkeypatch, "killed", "--lr", "2e-2")
    (folder / "killed/checkpoint").rename(folder / "killed/.checkpoint.old-1-00000000")
    rows = trained(folder, monkeypatch, "killed")
    assert "resuming after step 5" in capsys.readouterr().out
    same = ("step", "loss", "grad_norm", "lr", "validation_loss")
    assert [[row.get(name) for name in same] for row in rows] == [[row.get(name) for name in same] for row in qlora]
    name = "adapter/adapter_model.safetensors"
    assert (folder / "killed" / name).read_bytes() == (folder / "qlora" / name).read_bytes()


@pytest.mark.usefixtures("qlora")
def test_a_damaged_checkpoint_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(folder / "qlora", folder / "damaged")
    state = folder / "damaged/checkpoint/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"state\.safetensors is not what was written"):
        trained(folder, monkeypatch, "damaged")


def test_the_merge_adds_the_adapter_to_the_base_in_16_bit_and_certifies_it(folder: Path, merged_summary: str):
    """W + 2 B A, alpha being twice the rank, rounded to BF16; embedding and norms bit for bit; found out if altered."""
    base, adapter, merged = folder / "qwen3", folder / "qlora/adapter", folder / "qlora/merged"
    assert merged_summary == "24 tensors: 14 targeted, 14 changed, 10 identical bit for bit"
    old, new = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    low, high = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    wanted = (old[f"{name}.weight"].float() + 2 * high @ low).bfloat16()
    assert torch.equal(new[f"{name}.weight"], wanted)
    assert not torch.equal(wanted, old[f"{name}.weight"])
    still = [name for name in old if "norm" in name or "embed" in name]
    assert len(still) == 10
    assert all(torch.equal(old[name], new[name]) for name in still)
    certificate = read_certificate(merged)
    assert (certificate["merged_onto"], certificate["adapter"]["base_quantization"]) == ("original", "nf4")
    assert certificate["training"]["settings"]["train"]["global_batch"] == 2
    assert verify(merged, base, adapter) == []
    other = shutil.copytree(merged, folder / "other")
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert any("model.norm.weight is not what the certificate says" in problem for problem in verify(other, base))
    with pytest.raises(UserError, match="was trained on another base than"):
        merge(merged, adapter, folder / "twice")
    with pytest.raises(UserError, match="leave out --nemo and --base"):
        merge(base, adapter, folder / "twice", dequantized=True)


@pytest.mark.usefixtures("merged_summary")
def test_base_and_tuned_are_scored_and_reported(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Answers end at Qwen3's own tokens; the form of the reasoning is counted apart from what is right; one chain."""
    for model, name in (("qwen3", "scores-base.json"), ("qlora/merged", "scores.json")):
        asked = ["--questions", str(folder / "held.jsonl"), "--limit", "4", "--thinking", "--max-new-tokens", "12"]
        words = ["evaluate.py", str(folder / model), *asked, "--out", str(folder / "qlora" / name)]
        monkeypatch.setattr("sys.argv", words)
        assert evaluate.main() == 0
    result = read_result(folder / "qlora/scores.json")
    assert sum(sum(outcomes.values()) for outcomes in result["by_form"].values()) == 4
    page = report(folder / "qlora").read_text()
    assert "form of the reasoning: kept" in page
    links = lineage(parts_of(folder / "qlora"))
    assert [link.name for link in links] == ["source", "store", "adapter", "merged", "result", "result"]
    assert [link.problem for link in links] == [""] * 6


@pytest.mark.usefixtures("merged_summary")
def test_an_answer_ends_at_qwens_tokens_and_the_adapter_may_lie_beside(folder: Path):
    """The merged model answers as the base with the adapter beside it does, in logits, up to BF16's rounding."""
    base, adapter = folder / "qwen3", folder / "qlora/adapter"
    models = [HFModel(base, prepare=beside(adapter, base)), HFModel(folder / "qlora/merged")]
    assert models[0].prompts.stop_ids == (151643, 151645)
    tokens = torch.arange(1000, 1040)[None]
    with torch.no_grad():
        tuned, merged = (model.model(tokens, use_cache=False).logits for model in models)
        plain = HFModel(base).model(tokens, use_cache=False).logits
    assert (tuned - merged).abs().max() < 0.1 * (tuned - plain).abs().max()


def test_a_nemotron_is_sent_to_its_own_recipe():
    with pytest.raises(UserError, match=r"is a Nemotron-H; use recipes/nemotron_lora\.py"):
        plain_model.load_base(Path("nano3/presets/pico"), four_bit=True)
