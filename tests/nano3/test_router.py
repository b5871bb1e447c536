"""The router: a frozen one that moves is named at the next save, a balanced one moves by the rule and is merged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from data_prep.epochs import Epochs
from data_prep.packing import PackedDataset, build_packs
from finetune.settings import CheckpointSettings, LogSettings, LoraSettings, Settings, TrainSettings
from launch.plan.layout import Layout
from tests.helpers.rank_server import RankServer
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, write_run
from tests.helpers.token_reference import expert_load, weighted_store

SEQ_LENGTH, BATCH = 64, 4
MOE_LAYERS = (1, 4)
RATE = np.float32(1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks: RankServer) -> Path:
    """A model, data with much padding, and one balanced step with expert parallel 2: OUT `ep2`."""
    path = tmp_path_factory.mktemp("router")
    convert(tiny_hf_folder(path / "hf", dtypes={"": "F32"}), path / "nemo", context=False)
    build_packs(weighted_store(path / "store", documents=40, shortest=18, longest=30), SEQ_LENGTH)
    assert balanced(path, ranks, "ep2", Layout(ep=2), steps=1) == [0, 0]
    return path


def balanced(
    folder: Path, ranks: RankServer, name: str, layout: Layout, steps: int, fault: str = "", **settings: object
) -> list[int]:
    """Exit codes of a run on two ranks, balanced unless `settings` say otherwise; faults: tests/helpers/faults.py."""
    run = Settings(
        layout=layout,
        lora=LoraSettings(rank=4, alpha=8.0),
        train=TrainSettings(steps=steps, warmup=0, lr=0.01, global_batch=BATCH, seq_length=SEQ_LENGTH),
        log=LogSettings(tensorboard=False, wandb="off"),
        **{"router": "balance", **settings},
    )
    return ranks.run(write_run(folder, name, 2, run, validate=True), FAULT=fault)


def biases(adapter: Path) -> dict[int, np.ndarray]:
    """The correction biases in an adapter folder."""
    reader = TorchDistReader(adapter / "weights")
    return {n: reader.whole(f"module.decoder.layers.{n}.mlp.router.expert_bias").numpy() for n in MOE_LAYERS}


def of_hf(folder: Path) -> dict[int, np.ndarray]:
    """The correction biases in a Hugging Face folder."""
    tensors = load_file(folder / "model.safetensors")
    return {n: tensors[f"backbone.layers.{n}.mixer.gate.e_score_correction_bias"].numpy() for n in MOE_LAYERS}


def test_a_balanced_bias_moves_by_the_load_of_the_documents(folder):
    """Adapters start as nothing, so the first step's load is that of the base, which transformers gives."""
    packs = PackedDataset(folder / "store", SEQ_LENGTH)
    order = Epochs(packs, BATCH, TrainSettings().seed, shuffle=True)
    documents = np.concatenate([packs.documents(order.pack_of(sample)) for sample in range(BATCH)])
    tokens = int(sum(len(packs.store.document(int(number))[0]) - 1 for number in documents))
    assert tokens < 0.9 * BATCH * SEQ_LENGTH  # the rest is padding, which would count as tokens of one kind
    base, moved = of_hf(folder / "hf"), biases(folder / "ep2" / "adapter")
    for number, load in expert_load(folder / "hf", packs.store, documents).items():
        assert load.sum() == 2 * tokens  # two experts for each
        expected = base[number] + np.sign(load.mean() - load).astype(np.float32) * RATE
        assert np.array_equal(moved[number], expected), number


def test_a_balanced_bias_is_in_the_adapter_and_in_the_merged_model(folder, tmp_path):
    recorded = json.loads((folder / "ep2" / "adapter" / "lora.json").read_text())
    assert recorded["router"] == "balance"
    summary = merge(folder / "hf", folder / "ep2" / "adapter", tmp_path / "merged")
    assert "2 correction biases moved in training (router=balance) and replaced" in str(summary)
    before, after, moved = of_hf(folder / "hf"), of_hf(tmp_path / "merged"), biases(folder / "ep2" / "adapter")
    tensors = [load_file(path / "model.safetensors") for path in (folder / "hf", tmp_path / "merged")]
    for number in MOE_LAYERS:
        assert np.array_equal(after[number], moved[number])
        assert not np.array_equal(after[number], before[number])
        weights = [each[f"backbone.layers.{number}.mixer.gate.weight"] for each in tensors]
        assert torch.equal(*weights)


def test_a_balanced_run_says_so(folder):
    log = (folder / "ep2" / "logs" / "rank0.log").read_text()
    assert "correction biases move by 0.001 a step" in log
    row = metrics(folder / "ep2")[0]
    base, moved = of_hf(folder / "hf"), biases(folder / "ep2" / "adapter")
    distance = np.sqrt(sum(np.square(moved[number] - base[number]).sum() for number in MOE_LAYERS))
    assert row["router_bias_norm"] == pytest.approx(distance, rel=1e-5)


@pytest.mark.full
def test_a_balanced_run_is_the_same_on_other_layouts_and_goes_on_from_a_checkpoint(folder, ranks):
    every_step = CheckpointSettings(every=1)
    for name, layout in (("ep2-3", Layout(ep=2)), ("tp2-3", Layout(tp=2)), ("pp2-3", Layout(pp=2))):
        assert balanced(folder, ranks, name, layout, 3) == [0, 0]
    assert any(balanced(folder, ranks, "again", Layout(ep=2), 3, checkpoint=every_step, fault="kill:2"))
    assert balanced(folder, ranks, "again", Layout(ep=2), 3, checkpoint=every_step) == [0, 0]
    base, expected = of_hf(folder / "hf"), biases(folder / "ep2-3" / "adapter")
    for number in MOE_LAYERS:
        steps = (expected[number] - base[number]) / RATE
        assert np.abs(steps - steps.round()).max() < 1e-3
        assert 0 < np.abs(steps).max() < 3.5
        for name in ("tp2-3", "pp2-3", "again"):
            assert np.array_equal(biases(folder / name / "adapter")[number], expected[number]), name
    hashes = {
        json.loads((folder / name / "adapter" / "lora.json").read_text())["router_sha256"] for name in ("ep2", "again")
    }
    assert len(hashes) == 1  # of the base, also after a restart


@pytest.mark.full
@pytest.mark.parametrize(
    ("router", "part", "words"),
    [
        ("frozen", "bias", "the correction bias of layer 1 changed since the start"),
        ("frozen", "weight", "the weight of layer 1 changed since the start"),
        ("balance", "weight", "the weight of layer 1 changed since the start"),
    ],
)
def test_a_router_that_moves_stops_the_run_at_the_next_save(folder, ranks, router, part, words):
    name = f"{router}-{part}"
    fault = {"bias": "router:1", "weight": "router-weight:1"}[part]
    checkpoint = CheckpointSettings(every=2)
    assert any(balanced(folder, ranks, name, Layout(ep=2), 4, router=router, checkpoint=checkpoint, fault=fault))
    log = (folder / name / "logs" / "rank0.log").read_text()
    assert "the frozen router moved" in log
    assert words in log
    assert "nothing is saved" in log
    assert not (folder / name / "adapter").exists()
    assert not list((folder / name).glob("checkpoints/step-*"))
