"""recipes/nemotron_qlora.py on pico: from the Hugging Face folder to merged models; killed and resumed bit-equal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conversion.certify import verify
from conversion.checkpoint.model_folder import HFFolder
from conversion.identity import remembered_hash
from conversion.merge_lora import merge
from data_prep.packing import build_packs
from evaluation.lineage import lineage, parts_of
from finetune.checks import check_run
from finetune.recipe_file import keep, recipe_of
from finetune.run_local import import_base, last_checkpoint, write_run
from finetune.settings import CheckpointSettings, LogSettings, Run
from launch.plan.hardware import HARDWARE
from launch.plan.layout import Layout
from launch.plan.memory import plan_memory
from launch.plan.plan_settings import Plan, TrainPlan
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError
from nano3.nf4 import quantize
from nano3.sealed_folder import seal
from nano3.tensor_names import linear_tensors
from nano3.token_store import TokenStore
from recipes.nemotron_lora import nemotron_3_nano_lora
from recipes.nemotron_qlora import LOSS_CHUNK, fitting, nemotron_3_nano_qlora, settings
from tests.finetune.test_resume import assert_same, log
from tests.helpers.rank_server import RankServer
from tests.helpers.tiny_run import metrics
from tests.helpers.tiny_store import tiny_store

PICO = resolve_model("pico")
FEW_EXPERTS = "decoder.layers.1.mlp.experts.linear_fc2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora")
    tiny_store(folder / "store", documents=60, longest=30, vocab_size=312)
    build_packs(TokenStore(folder / "store"), 64)
    return folder


def qlora(folder: Path, name: str, ranks: int = 1, **lora: object) -> Run:
    """Four hot steps, a checkpoint every other one; written and ready to start."""
    chosen = settings()
    chosen.lora = replace(chosen.lora, rank=4, alpha=8.0, **lora)
    chosen.train = replace(chosen.train, steps=4, warmup=1, lr=1e-2, global_batch=2, seq_length=64, recompute=[])
    chosen.checkpoint = CheckpointSettings(every=2, minutes=0)
    chosen.log = LogSettings(tensorboard=False, wandb="off")
    chosen.layout = Layout(ep=ranks)
    out = folder / name
    recipe = recipe_of(nemotron_3_nano_qlora)
    run = Run(
        str(PICO), str(out / "base"), str(folder / "store"), None, str(out), 1, ranks, True, chosen, recipe=recipe
    )
    keep(run.recipe, out)
    import_base(run)
    write_run(run)
    return run


def train(ranks: RankServer, run: Run, **environment: str) -> Path:
    codes = ranks.run(Path(run.out) / "run.json", **environment)
    assert environment or codes == [0] * run.ranks, log(Path(run.out))[-3000:]
    return Path(run.out)


@pytest.fixture(scope="module")
def trained(folder: Path, ranks: RankServer) -> Path:
    return train(ranks, qlora(folder, "run"))


@pytest.mark.full
def test_no_copy_of_the_base_is_written(trained):
    """OUT/base says which weights they are, and lora.json says so too, and what they were in."""
    assert [path.name for path in (trained / "base").iterdir()] == ["base.json"]
    said = json.loads((trained / "adapter" / "lora.json").read_text())
    assert said["base_quantization"] == "nf4"
    assert (
        said["base_sha256"] == json.loads((trained / "base/base.json").read_text())["sha256"] == remembered_hash(PICO)
    )
    losses = [row["loss"] for row in metrics(trained)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.full
def test_the_report_knows_whose_weights_they_are(trained):
    links = {link.name: link for link in lineage(parts_of(trained))}
    assert {name: link.problem for name, link in links.items()} == {"source": "", "store": "", "adapter": ""}
    assert links["source"].sha256 == remembered_hash(PICO)


@pytest.mark.full
def test_an_evaluation_reads_the_same_weights(trained):
    """Its own folder is OUT/evaluation, and OUT/base is still no checkpoint."""
    run = Run.from_json((trained / "run.json").read_text())
    assert run.weights == replace(run, out=str(trained / "evaluation")).weights == str(PICO)


@pytest.mark.full
def test_killed_and_resumed_it_ends_bit_equal(folder, ranks, trained):
    run = qlora(folder, "killed")
    train(ranks, run, FAULT="kill:3")
    assert not (folder / "killed/adapter").exists()
    train(ranks, run)
    assert "resumed at step 2" in log(folder / "killed")
    assert_same(folder / "killed", trained)


@pytest.mark.full
def test_another_base_is_another_run(trained, tmp_path):
    """The checkpoints are refused; the record of the base makes way for an import."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    run = Run.from_json((trained / "run.json").read_text())
    run = replace(run, out=str(tmp_path), base=str(tmp_path / "base"))
    import_base(run)
    assert last_checkpoint(run) is not None
    run.settings.lora.base = "original"
    import_base(run)
    assert (tmp_path / "base/weights").is_dir()
    with pytest.raises(UserError, match=r"lora\.base"):
        last_checkpoint(run)


@pytest.mark.full
def test_merged_onto_the_original_weights_by_default(trained, tmp_path):
    summary = merge(PICO, trained / "adapter", tmp_path / "merged")
    assert summary.targeted == summary.changed == len(linear_tensors(Arch.load(PICO)))
    certificate = json.loads((tmp_path / "merged/certificate.json").read_text())
    assert certificate["merged_onto"] == "original"
    assert certificate["adapter"]["base_quantization"] == "nf4"
    assert "merged onto the original weights" in (tmp_path / "merged/model_card.md").read_text()
    assert verify(tmp_path / "merged", PICO, trained / "adapter") == []


@pytest.mark.full
def test_merged_onto_the_weights_that_it_was_trained_on(folder, ranks, tmp_path):
    """An adapter of one layer: every other linear layer becomes what NF4 makes of it, and nothing else changes."""
    run = qlora(folder, "one-layer", targets=["*.layers.0.mixer.in_proj"])
    adapter = train(ranks, run) / "adapter"
    summary = merge(PICO, adapter, tmp_path / "merged", dequantized=True)
    assert str(summary).startswith(f"{summary.total} tensors: {len(linear_tensors(Arch.load(PICO)))} targeted")
    with HFFolder(PICO) as base, HFFolder(tmp_path / "merged") as made:
        for name, entry in base.layout.entries.items():
            old, new = (model.rows(name, 0, entry.rows) for model in (base, made))
            wanted = quantize(old).values(old.dtype) if name in linear_tensors(base.arch) else old
            assert torch.equal(new, wanted) == (name != "backbone.layers.0.mixer.in_proj.weight"), name
    certificate = json.loads((tmp_path / "merged/certificate.json").read_text())
    assert certificate["merged_onto"] == "dequantized"
    by = {name: line.get("by") for name, line in certificate["tensors"].items()}
    assert by["backbone.layers.0.mixer.in_proj.weight"] == ["base=dequantized", "decoder.layers.0.mixer.in_proj"]
    assert by["backbone.layers.0.mixer.out_proj.weight"] == ["base=dequantized"]
    assert verify(tmp_path / "merged", PICO, adapter) == []


@pytest.mark.full
def test_an_adapter_that_saw_the_original_weights_is_not_merged_onto_others(trained, tmp_path):
    shutil.copytree(trained / "adapter", tmp_path / "plain")
    for name in ("files.json", "nano3.json"):
        (tmp_path / "plain" / name).unlink(missing_ok=True)
    said = json.loads((tmp_path / "plain/lora.json").read_text()) | {"base_quantization": None}
    (tmp_path / "plain/lora.json").write_text(json.dumps(said))
    seal(tmp_path / "plain")
    with pytest.raises(UserError, match="was not trained on a quantized base"):
        merge(PICO, tmp_path / "plain", tmp_path / "merged", dequantized=True)


@pytest.mark.full
def test_two_ranks_with_half_of_the_experts_each_train_the_same_model(folder, ranks, trained):
    two = train(ranks, qlora(folder, "two-ranks", 2))
    alone, together = ([row["loss"] for row in metrics(out)] for out in (trained, two))
    assert together == pytest.approx(alone, rel=1e-5)


def test_by_default_it_is_what_fits_the_card_that_is_there():
    arch = Arch.load(resolve_model("nano"))
    for name, gpu in HARDWARE.items():
        seq_length, recompute = fitting(gpu.memory_gib)
        plan = Plan(
            lora=settings().lora,
            train=TrainPlan(global_batch=16, seq_length=seq_length, recompute=[*recompute], loss_chunk=LOSS_CHUNK),
        )
        assert plan_memory(plan.workload(arch, 1)).tightest.total <= 0.9 * gpu.memory, name
    assert fitting(None) == fitting(22.4) == (4096, ("full",))
    original = Plan(train=TrainPlan(global_batch=16, seq_length=4096, recompute=["full"]))
    assert not plan_memory(original.workload(arch, 1)).fits(HARDWARE["rtx5090"])


def test_what_cannot_be_cut_is_refused_before_anything_loads():
    """pico's experts are 96 wide: not whole blocks of 64. Cut between rows they are fine."""
    run = Run(str(PICO), "base", "store", None, "out", 1, 2, True, settings())
    run.settings.train.steps, run.settings.train.global_batch = 4, 2
    run.settings.layout = Layout(etp=2)
    with pytest.raises(UserError, match=rf"layout.etp=2 cuts the rows of {FEW_EXPERTS}, which have 96 values"):
        check_run(run, Arch.load(PICO))
    run.settings.layout = Layout(tp=2)
    check_run(run, Arch.load(PICO))


def test_the_recipe_is_nemotron_loras_but_for_the_base():
    assert settings().lora.base == "nf4"
    assert nemotron_3_nano_lora is not nemotron_3_nano_qlora
