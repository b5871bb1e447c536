"""conversion/submission.py: what the zip holds, PEFT's answer from it, and what vLLM would not load all of."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.adapters.unmerged import with_adapter
from conversion.submission import check_submission, write_submission
from evaluation.hf_model import load_reference
from nano3.cli import UserError
from nano3.targets import PRESETS
from tests.conversion.test_merge import write_adapter
from tests.conversion.test_peft_export import FP32, logits, random_values
from tests.helpers.tiny import tiny_hf_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.3.mixer.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("base") / "hf", torch_dtype="float32")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a right submission, unpacked, and the zip beside them."""
    folder = tmp_path_factory.mktemp("good")
    adapter = write_adapter(folder / "adapter", random_values, config=FP32, targets=PRESETS["peft"])
    holds = write_submission(adapter, folder / "submission.zip")
    # 2 in_proj, q k v o, 2 shared experts of 2 matrices
    assert holds.startswith("rank 4, 10 modules, F32, ")
    with zipfile.ZipFile(folder / "submission.zip") as packed:
        assert packed.namelist() == [CONFIG, WEIGHTS]
        packed.extractall(folder / "files")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "files", "submission.zip"]
    return folder


def test_peft_loads_what_the_zip_holds_and_answers_as_the_adapter_does(good: Path, base: Path):
    peft = pytest.importorskip("peft")
    model: Any = load_reference(base, torch.float32)
    before = logits(model)
    found = logits(peft.PeftModel.from_pretrained(model, good / "files"))
    beside: Any = load_reference(base, torch.float32)
    with_adapter(good / "adapter", base)(beside)
    assert (found - logits(beside)).abs().max() < 1e-5
    assert (found - before).abs().max() > 0.1
    assert check_submission(good / "submission.zip", base).startswith("rank 4, 10 modules")


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return apply


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return tensors(lambda held: [held.update({key.replace(old, new): held.pop(key)}) for key in list(held)])


def without(*parts: str) -> Callable[[Path], None]:
    return tensors(lambda held: [held.pop(key) for key in list(held) if any(part in key for part in parts)])


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DoRA": (settings(use_dora=True), "lora_magnitude_vector"),
    "biases": (settings(bias="all"), "bias='all'"),
    "another rank": (settings(r=8), r"has shape \(4, .* rank 8"),
    "an alpha of its own": (settings(alpha_pattern={"in_proj": 3}), "in_proj has a rank or an alpha of its own"),
    "a lost target": (without("layers.3.mixer.q_proj"), "targets .*q_proj, and there are no tensors for .*layers.3"),
    "one layer's target lost": (
        lambda folder: (without("layers.0.mixer.in_proj")(folder), settings(target_modules=["in_proj"])(folder)),
        r"targets in_proj, and there are no tensors for backbone\.layers\.0",
    ),
    "a target of another model": (
        settings(target_modules=["gate_proj"]),
        "targets gate_proj, and there are no tensors",
    ),
    "a name of another model": (renamed("q_proj", "query"), "adapts model.layers.3.mixer.query"),
    "a name of no reader": (
        tensors(lambda held: held.update({"x": torch.ones(1)})),
        "holds x, which is no tensor of a LoRA adapter",
    ),
    "FP64": (
        tensors(lambda held: held.update({key: held[key].double() for key in held})),
        "F64",
    ),
    "NaN": (tensors(lambda held: held[f"{Q}.lora_A.weight"].fill_(torch.nan)), "holds NaN"),
    "another file": (lambda folder: (folder / "README.md").write_text("hello"), "holds README.md"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "must hold adapter_config.json and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_would_not_load_all_of_is_refused(case: str, good: Path, base: Path, tmp_path: Path):
    change, message = REFUSED[case]
    (tmp_path / "files").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "files" / name).write_bytes((good / "files" / name).read_bytes())
    tensors(len)(tmp_path / "files")  # as other tools write it: without our facts in the header
    change(tmp_path / "files")
    with zipfile.ZipFile(tmp_path / "their.zip", "w") as packed:
        for path in sorted((tmp_path / "files").iterdir()):
            packed.write(path, path.name)
    with pytest.raises(UserError, match=message):
        check_submission(tmp_path / "their.zip", base)


def test_a_zip_of_an_older_tool_with_the_names_of_transformers_4_passes(good: Path, base: Path, tmp_path: Path):
    """vLLM maps `backbone.` to its own names (`hf_to_vllm_mapper`)."""
    (tmp_path / "files").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "files" / name).write_bytes((good / "files" / name).read_bytes())
    renamed("model.model.layers", "model.backbone.layers")(tmp_path / "files")
    settings(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "in_proj"])(tmp_path / "files")
    with zipfile.ZipFile(tmp_path / "their.zip", "w") as packed:
        for name in (CONFIG, WEIGHTS):
            packed.write(tmp_path / "files" / name, name)
    assert check_submission(tmp_path / "their.zip", base).startswith("rank 4, 10 modules")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"targets": ("linear_fc2",), "experts": "each"}, "vllm cannot represent"),
        ({"targets": PRESETS["peft"], "rank": 64}, "has shape"),
    ],
)
def test_an_adapter_that_vllm_cannot_take_writes_no_zip(kind: dict[str, Any], message: str, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", config=FP32, **kind)
    with pytest.raises(UserError, match=message):
        write_submission(adapter, tmp_path / "out.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_rank_above_the_limit_writes_no_zip(good: Path, tmp_path: Path):
    with pytest.raises(UserError, match="rank 4 is above 2, the largest"):
        write_submission(good / "adapter", tmp_path / "out.zip", max_rank=2)
    with pytest.raises(UserError, match="no name of a zip file"):
        write_submission(good / "adapter", tmp_path / "out")
    assert not list(tmp_path.iterdir())
