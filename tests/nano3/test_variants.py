"""Every kind of adapter: merged equals unmerged, two ranks equal one, and what is broken on purpose shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conversion.adapter import export
from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from evaluation.hf_model import load_reference
from tests.helpers.rank_server import server
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.variants import EVERYTHING, FAULTS, LAYOUTS, ONE_BY_ONE, VARIANTS

LENGTHS = (7, 1, 12, 20)
"""As in tests/helpers/variants_worker.py, which only its own processes may import."""
VOCABULARY = 133
"""Padded to 256 rows on one rank and on two."""


def run(folder: Path, names: dict[str, Any]) -> Path:
    """Runs the worker on two ranks for these variants."""
    source = tiny_hf_folder(folder / "hf", dtypes={"": "F32"}, hybrid_override_pattern="MEM*E-", vocab_size=VOCABULARY)
    convert(source, folder / "nemo", context=False)
    codes = server().ranks("tests.helpers.variants_worker", [str(folder), ",".join(names)], 2, folder / "logs")
    assert codes == [0, 0], (folder / "logs" / "rank0.log").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("variants"), EVERYTHING)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("variants"), ONE_BY_ONE)


@pytest.fixture(params=[*EVERYTHING, *(pytest.param(name, marks=pytest.mark.full) for name in ONE_BY_ONE)])
def variant(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """Folder of the results, name of the variant."""
    group = "everything" if request.param in EVERYTHING else "one_by_one"
    return request.getfixturevalue(group), request.param


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def largest_error(found: Path, expected: Path, zero_is_fine: bool = False) -> float:
    """Of any tensor of two adapters, relative to that tensor's largest value."""
    reader, reference = TorchDistReader(found / "weights"), TorchDistReader(expected / "weights")
    assert reader.shapes == reference.shapes
    worst = 0.0
    for key in reference.shapes:
        value = reference.whole(key)
        assert zero_is_fine or value.abs().max() > 0, f"{key} has no gradient at all"
        worst = max(worst, float((reader.whole(key) - value).abs().max() / value.abs().max().clamp_min(1e-30)))
    return worst


def test_the_merge_equals_the_adapted_model(variant, tmp_path):
    """Plain transformers on the merged folder against Megatron-Core; A, B and lengths are not as they began."""
    folder, name = variant
    logits = load_file(folder / "logits.safetensors")
    merge(folder / "hf", folder / name / "initial", tmp_path / "merged")
    model = load_reference(tmp_path / "merged", torch.float32)
    with torch.no_grad():
        merged = torch.cat([model(document[None]).logits[0] for document in logits["tokens"].split(LENGTHS)])
        base = load_reference(folder / "hf", torch.float32)(logits["tokens"][None, : LENGTHS[0]]).logits[0]
    assert (logits[name][:, :VOCABULARY] - merged).abs().max() < 1e-5
    assert (merged[: LENGTHS[0]] - base).abs().max() > 0.01
    assert (logits[name][:, VOCABULARY:] == torch.finfo(torch.float32).min).all()  # padding has no probability


def test_a_fresh_adapter_changes_nothing_and_dropout_is_for_training_only(variant):
    folder, name = variant
    numbers = results(folder)
    embedding_dora = VARIANTS[name].dora and "word_embeddings" in VARIANTS[name].targets
    assert numbers[f"{name} fresh"] <= (1e-6 if embedding_dora else 0)  # its lengths are summed in another order
    evaluated, trained = numbers[f"{name} dropout"]
    assert evaluated == 0
    assert trained > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(variant, layout):
    folder, name = variant
    ours, single = results(folder)[f"{name} {layout}"], results(folder)[f"{name} one"]
    assert ours["loss"] == pytest.approx(single["loss"], rel=1e-6)
    assert ours["norm"] == pytest.approx(single["norm"], rel=1e-5)
    assert largest_error(folder / name / layout, folder / name / "one") < 1e-5
    assert largest_error(folder / name / f"fresh-{layout}", folder / name / "fresh-one", zero_is_fine=True) < 1e-6


def test_first_updates_show_the_learning_rates(variant):
    """Adam's first update is the learning rate, plus decay of what is decayed (0.5 here): A and B, not the lengths."""
    folder, name = variant
    moved = results(folder)[f"{name} one"]
    ratio = VARIANTS[name].plus_ratio
    assert 1 < moved["in"] < 1.5
    assert ratio < moved["out"] < 1.5 * ratio
    assert moved["magnitude"] == pytest.approx(1 if VARIANTS[name].dora else 0, abs=1e-3)


@pytest.mark.parametrize("broken", FAULTS)
def test_what_is_broken_shows(everything, broken):
    name, layout = FAULTS[broken]
    numbers, right = results(everything)[broken], results(everything)[f"{name} one"]
    errors = {
        "norm": abs(numbers["norm"] / right["norm"] - 1),
        "gradients": largest_error(everything / name / broken, everything / name / "one"),
        "magnitude": abs(numbers["magnitude"] - 1),
    }
    shown = {"mixed experts": "gradients", "length of a slice": "gradients", "norm of one rank": "norm"}
    assert errors[shown.get(broken, "magnitude")] > 1e-3, (layout, errors)


@pytest.mark.full
def test_peft_gives_the_logits_of_megatron(one_by_one, tmp_path):
    """The exported adapter in Hugging Face PEFT; Mamba's out_proj it would refuse."""
    peft = pytest.importorskip("peft")
    export(one_by_one / "peft" / "initial", tmp_path / "exported", "peft")
    model = peft.PeftModel.from_pretrained(
        load_reference(one_by_one / "hf", torch.float32), tmp_path / "exported"
    ).eval()
    logits = load_file(one_by_one / "logits.safetensors")
    with torch.no_grad():
        found = torch.cat([model(document[None]).logits[0] for document in logits["tokens"].split(LENGTHS)])
    assert (logits["peft"][:, :VOCABULARY] - found).abs().max() < 1e-5
    with pytest.raises(ValueError, match="out_proj"):
        peft.get_peft_model(model.get_base_model(), peft.LoraConfig(target_modules=["out_proj"]))
