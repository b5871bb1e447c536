"""Damaged inputs of every tool that writes a model: refused by name, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion import hf_to_nemo
from conversion.checkpoint import torch_dist_writer
from conversion.checkpoint.safetensors_layout import INDEX
from nano3.cli import UserError
from tests.conversion.test_conversion import edit_index, resave, truncate
from tests.conversion.test_conversion_killed import TOOLS
from tests.conversion.test_merge import write_adapter
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder

EXPERT = "backbone.layers.1.mixer.experts.3.up_proj.weight"


def spoil(value: float) -> Callable[[Path], None]:
    """One value of one expert is not a number."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT][5, 7] = value

    return lambda folder: resave(folder, change)


DAMAGE: dict[str, tuple[int, Callable[[Path], Any], str]] = {
    "truncated shard": (3, truncate, r"model-0000.-of-00003\.safetensors has .* truncated"),
    "wrong index": (
        3,
        lambda f: edit_index(f, lambda m: m.update({EXPERT: m["lm_head.weight"]} if m[EXPERT] != m["lm_head.weight"]
                                                   else {EXPERT: m["backbone.embeddings.weight"]})),
        EXPERT,
    ),
    "missing expert": (1, lambda f: resave(f, lambda t: t.pop(EXPERT)), f"lacks {EXPERT}"),
    "NaN": (1, spoil(float("nan")), f"{EXPERT} holds NaN or infinity"),
    "infinity": (1, spoil(-float("inf")), f"{EXPERT} holds NaN or infinity"),
    "unknown tensor": (1, lambda f: resave(f, lambda t: t.update({"mtp.w": torch.zeros(2)})), r"holds mtp\.w"),
}  # fmt: skip


@pytest.mark.parametrize("tool", ["import", "merge", "quantize"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused_by_name(tool: str, damage: str, tmp_path: Path):
    shards, change, message = DAMAGE[damage]
    inputs, out = tmp_path / "inputs", tmp_path / "work" / "out"
    out.parent.mkdir()
    tiny_hf_folder(inputs / "hf", shards=shards)
    write_adapter(inputs / "adapter", config=TINY_CONFIG)
    change(inputs / "hf")
    with pytest.raises(UserError, match=message):
        TOOLS[tool](inputs, out)
    assert os.listdir(out.parent) == []


def test_a_wrong_index_names_a_tensor_that_is_elsewhere(tmp_path: Path):
    """The case above does move the tensor to another file."""
    source = tiny_hf_folder(tmp_path / "hf", shards=3)
    before = json.loads((source / INDEX).read_text())["weight_map"][EXPERT]
    DAMAGE["wrong index"][1](source)
    assert json.loads((source / INDEX).read_text())["weight_map"][EXPERT] != before


@pytest.fixture
def nemo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A NeMo checkpoint with a NaN, as a training that diverged leaves it."""
    source = tiny_hf_folder(tmp_path / "source")
    spoil(float("nan"))(source)
    with monkeypatch.context() as patch:
        patch.setattr(torch_dist_writer, "refuse_not_finite", lambda *_: None)
        hf_to_nemo.convert(source, tmp_path / "inputs" / "nemo", context=False)
    return tmp_path / "inputs" / "nemo"


def test_nan_in_a_nemo_checkpoint_is_refused_by_name(nemo: Path, tmp_path: Path):
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError, match=f"{EXPERT} holds NaN or infinity"):
        TOOLS["export"](nemo.parent, tmp_path / "work" / "out")
    assert os.listdir(tmp_path / "work") == []


def test_a_truncated_file_of_a_nemo_checkpoint_is_refused_by_name(nemo: Path, tmp_path: Path):
    (tmp_path / "work").mkdir()
    file = max((nemo / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=f"{file.name} has .* bytes and should have"):
        TOOLS["export"](nemo.parent, tmp_path / "work" / "out")
    assert os.listdir(tmp_path / "work") == []


def test_what_a_refused_run_replaces_stays(tmp_path: Path):
    """A good output of an earlier run survives a refusal amid the next."""
    good = tiny_hf_folder(tmp_path / "good")
    out = tmp_path / "work" / "out"
    hf_to_nemo.convert(good, out, context=False)
    before = (out / "base.json").read_bytes()
    bad = shutil.copytree(good, tmp_path / "bad")
    spoil(float("nan"))(bad)
    with pytest.raises(UserError, match="NaN"):
        hf_to_nemo.convert(bad, out, context=False)
    assert os.listdir(out.parent) == ["out"]
    assert (out / "base.json").read_bytes() == before
