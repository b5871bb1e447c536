"""The precision of GPUs on CPU ranks: BF16 model, FP32 gradients, distributed optimizer, expert parallel 2."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from data_prep.packing import build_packs
from finetune.settings import LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from nano3.targets import PRESETS
from nano3.token_store import TokenStore
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, run, write_run
from tests.helpers.tiny_store import tiny_store

STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an FP32 and a BF16 run of the same recipe; the base has router biases that BF16 cannot hold."""
    folder = tmp_path_factory.mktemp("bf16")
    source = tiny_hf_folder(folder / "hf")
    convert(source, folder / "nemo", context=False)
    tiny_store(folder / "store", documents=60, longest=30, vocab_size=128)
    build_packs(TokenStore(folder / "store"), 64)
    for precision in ("fp32", "bf16"):
        settings = Settings(
            layout=Layout(ep=2),
            lora=LoraSettings(rank=4, alpha=8.0),
            train=TrainSettings(steps=STEPS, warmup=1, lr=1e-2, global_batch=4, seq_length=64, precision=precision),
            log=LogSettings(tensorboard=False, wandb="off"),
        )
        run(write_run(folder, precision, 2, settings))
    return folder


@pytest.fixture(scope="module")
def everything(runs: Path) -> Path:
    """A BF16 run with every kind of adapter parameter: of single experts, of the vocabulary, lengths."""
    targets = [*PRESETS["all"], "word_embeddings", "output_layer"]
    settings = Settings(
        layout=Layout(ep=2),
        lora=LoraSettings(rank=4, alpha=8.0, targets=targets, experts="each", dora=True, plus_ratio=2.0),
        train=TrainSettings(steps=STEPS, warmup=1, lr=1e-2, global_batch=4, seq_length=64, precision="bf16"),
        log=LogSettings(tensorboard=False, wandb="off"),
    )
    return run(write_run(runs, "everything", 2, settings))


@pytest.mark.full
def test_bf16_trains_as_fp32_does_and_keeps_the_router(runs):
    losses = {name: [row["loss"] for row in metrics(runs / name)] for name in ("fp32", "bf16")}
    assert len(losses["bf16"]) == STEPS
    # BF16 has 8 bits: losses around 5 agree to the third digit, gradients to some percent.
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.03)
    recorded = {name: json.loads((runs / name / "adapter" / "lora.json").read_text()) for name in losses}
    assert recorded["bf16"]["router_sha256"] == recorded["fp32"]["router_sha256"]
    reader = TorchDistReader(runs / "bf16" / "adapter" / "weights")
    assert {reader.dtype(key) for key in reader.shapes} == {"BF16"}
    trained = [key for key in reader.shapes if "linear_out" in key and reader.whole(key).abs().max() > 0]
    assert len(trained) == sum("linear_out" in key for key in reader.shapes)


@pytest.mark.full
def test_a_bf16_adapter_merges_into_its_base(runs, tmp_path):
    summary = merge(runs / "hf", runs / "bf16" / "adapter", tmp_path / "merged")
    assert summary.same_routers
    before, after = load_file(runs / "hf" / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}
    untouched = [name for name in before if any(part in name for part in ("A_log", "gate", "norm", "embeddings"))]
    assert all(torch.equal(before[name], after[name]) for name in untouched)


@pytest.mark.full
def test_lengths_stay_fp32_beside_bf16_factors(runs, everything, tmp_path):
    losses = [row["loss"] for row in metrics(everything) if "loss" in row]
    plain = [row["loss"] for row in metrics(runs / "fp32") if "loss" in row]
    assert losses[0] == pytest.approx(plain[0], abs=0.03)  # a fresh adapter of any kind is the base model
    assert losses[-1] < losses[0]
    reader = TorchDistReader(everything / "adapter" / "weights")
    dtypes = {key: reader.dtype(key) for key in reader.shapes}
    assert {dtypes[key] for key in dtypes if ".magnitude" in key} == {"F32"}
    assert {dtypes[key] for key in dtypes if ".adapter.linear_" in key} == {"BF16"}
    assert merge(runs / "hf", everything / "adapter", tmp_path / "merged").same_routers
