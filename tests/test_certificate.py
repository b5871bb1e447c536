"""The certificate of a merge and of a quantization: what it says, and that a copy that was altered is found out."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.certificate import read_certificate
from conversion.certify import model_card, verify
from conversion.fp8 import Selection
from conversion.identity import content_hash, hf_facts
from conversion.merge_lora import merge
from conversion.quantize_fp8 import quantize
from conversion.safetensors_io import HFFolder
from nano3.arch import Arch
from nano3.cli import UserError
from tests.test_merge import fill, write_adapter
from tests.tiny import TINY_CONFIG, tiny_hf_folder

CHANGED = "backbone.layers.0.mixer.out_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `adapter`, and their `merged` model, of which one tensor changed."""
    folder = tmp_path_factory.mktemp("certificate")
    tiny_hf_folder(folder / "base", torch_dtype="float32")
    key = "module.decoder.layers.0.mixer.out_proj.adapter.linear_out.weight"
    config = TINY_CONFIG | {"torch_dtype": "float32"}
    write_adapter(folder / "adapter", fill(key, (32, 0.25)), config=config)
    merge(folder / "base", folder / "adapter", folder / "merged")
    return folder


def test_a_merge_says_what_changed_and_by_how_much(folders):
    said = read_certificate(folders / "merged")
    base, after = load_file(folders / "base/model.safetensors"), load_file(folders / "merged/model.safetensors")
    assert said["kind"] == "merge"
    assert said["router"] == "frozen"
    assert said["totals"] == {
        "identical": len(base) - 1,
        "changed": 1,
        "cast": 0,
        "quantized": 0,
        "added": 0,
        "dropped": 0,
    }
    line = said["tensors"][CHANGED]
    assert line["by"] == ["decoder.layers.0.mixer.out_proj"]
    # Every value of the (32, 64) matrix grew by 0.25.
    assert line["relative_change"] == pytest.approx(0.25 * (32 * 64) ** 0.5 / float(base[CHANGED].norm()), rel=1e-5)
    assert line["input"]["sha256"] != line["output"]["sha256"]
    assert said["tensors"]["lm_head.weight"]["what"] == "identical"
    assert torch.equal(after["lm_head.weight"], base["lm_head.weight"])
    assert verify(folders / "merged", folders / "base") == []
    assert "1 changed" in model_card(said)


def test_quantization_certifies_scales_and_errors(folders, tmp_path):
    selection = Selection.published(Arch.load(folders / "merged"))
    quantize(folders / "merged", tmp_path / "fp8", selection, [np.arange(16)])
    said = read_certificate(tmp_path / "fp8")
    assert said["totals"]["quantized"] == len(selection.chosen)
    assert said["totals"]["added"] == len(selection.scalars)
    assert said["input"]["sha256"] == read_certificate(folders / "merged")["output"]["sha256"]
    errors = [line["relative_error"] for line in said["tensors"].values() if line["what"] == "quantized"]
    assert 0.01 < min(errors) < max(errors) < 0.04  # half a step of 3 bits behind the point, a little more near zero
    assert verify(tmp_path / "fp8", folders / "merged") == []
    assert "error of FP8" in model_card(said)


Tensors = dict[str, torch.Tensor]


def nudge(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[0] += 1e-3

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nudge("lm_head.weight"), "lm_head.weight is not what the certificate says"),
        (nudge("backbone.layers.1.mixer.gate.e_score_correction_bias"), "e_score_correction_bias is not what"),
        (lambda t: t.pop("backbone.layers.1.mixer.experts.7.up_proj.weight"), "lacks .*experts.7.up_proj"),
    ],
)
def test_an_altered_copy_is_found_out(folders, tmp_path, change, message):
    shutil.copytree(folders / "merged", tmp_path / "copy")
    tensors = load_file(tmp_path / "copy/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "copy/model.safetensors")
    assert any(re.search(message, problem) for problem in verify(tmp_path / "copy"))


def test_a_certificate_that_was_made_to_fit_is_found_out_by_the_base(folders, tmp_path):
    """Somebody moves a router and lets the certificate say that it is identical: only the base can tell."""
    shutil.copytree(folders / "merged", tmp_path / "copy")
    name = "backbone.layers.1.mixer.gate.weight"
    tensors = load_file(tmp_path / "copy/model.safetensors")
    nudge(name)(tensors)
    save_file(tensors, tmp_path / "copy/model.safetensors")
    said = read_certificate(tmp_path / "copy")
    line: dict[str, Any] = said["tensors"][name]
    line["output"]["sha256"] = line["input"]["sha256"] = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
    (tmp_path / "copy/certificate.json").write_text(json.dumps(said))
    told = "\n".join(verify(tmp_path / "copy"))
    assert "has not the content hash that the certificate names as its output" in told
    with HFFolder(tmp_path / "copy") as hf:  # and the whole's hash too
        said["output"]["sha256"] = content_hash(hf_facts(hf))
    (tmp_path / "copy/certificate.json").write_text(json.dumps(said))
    assert verify(tmp_path / "copy") == []
    assert any(name in problem for problem in verify(tmp_path / "copy", folders / "base"))
    assert any("not the model" in problem for problem in verify(folders / "merged", tmp_path / "copy"))


def test_words_that_the_hashes_contradict_are_found_out(folders, tmp_path):
    """A router that moved, with its true hashes, and "identical" beside them."""
    shutil.copytree(folders / "merged", tmp_path / "copy")
    name = "backbone.layers.1.mixer.gate.weight"
    tensors = load_file(tmp_path / "copy/model.safetensors")
    nudge(name)(tensors)
    save_file(tensors, tmp_path / "copy/model.safetensors")
    said = read_certificate(tmp_path / "copy")
    said["tensors"][name]["output"]["sha256"] = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
    with HFFolder(tmp_path / "copy") as hf:
        said["output"]["sha256"] = content_hash(hf_facts(hf))
    (tmp_path / "copy/certificate.json").write_text(json.dumps(said))
    told = "\n".join(verify(tmp_path / "copy", folders / "base"))
    assert f"calls {name} identical, and its hashes say changed" in told
    assert "the router is not that of the input" in told
    assert "totals" in told


def test_a_certificate_with_parts_missing_is_refused(folders, tmp_path):
    said = read_certificate(folders / "merged")
    for change in ({"input": None}, {"tensors": {"a": 1}}, {"tensors": {"a": {"what": "added"}}}, {"kind": 3}):
        (tmp_path / "certificate.json").write_text(json.dumps(said | change))
        with pytest.raises(UserError, match="is not of format 2"):
            verify(tmp_path)


def test_no_certificate_no_verdict(folders):
    with pytest.raises(UserError, match=r"has no certificate\.json"):
        verify(folders / "base")
