"""Heads of multi-token prediction: through import, export, merge and FP8 byte for byte, and named as not tuned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.certificates.certificate_json import certificate_text, read_certificate, sealed
from conversion.certify import verify
from conversion.dequantize import dequantize
from conversion.fp8.readers import tensorrt_excludes, vllm_excludes
from conversion.fp8.selection import Selection
from conversion.hf_to_nemo import convert as to_nemo
from conversion.lint_export import lint
from conversion.merge_lora import merge
from conversion.nemo_to_hf import convert as to_hf
from conversion.quantize_fp8 import quantize
from evaluation.hf_model import load_reference
from nano3.arch import MTP, Arch
from nano3.cli import UserError
from tests.conversion.test_fp8 import samples
from tests.conversion.test_merge import write_adapter
from tests.conversion.test_merge_nemo import randomize
from tests.helpers.tiny import MTP_CONFIG, TINY_CONFIG, tiny_hf_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a base with a head; `merged`, an adapter merged into it; `fp8`, that in FP8."""
    folder = tmp_path_factory.mktemp("mtp")
    base = tiny_hf_folder(folder / "hf", shards=2, **MTP_CONFIG)
    write_adapter(folder / "adapter", randomize, config=TINY_CONFIG | MTP_CONFIG)
    merge(base, folder / "adapter", folder / "merged")
    quantize(folder / "merged", folder / "fp8", Selection.published(Arch.load(base)), samples())
    return folder


def heads(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the head in a Hugging Face folder."""
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor for name, tensor in found.items() if name.startswith(MTP)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]) for name, tensor in found.items()
    )


def test_import_and_export_give_every_file_back(folder: Path):
    to_nemo(folder / "hf", folder / "nemo", context=False)
    to_hf(folder / "nemo", folder / "back")
    for path in folder.glob("hf/*.safetensors*"):
        assert (folder / "back" / path.name).read_bytes() == path.read_bytes()
    assert verify(folder / "nemo", folder / "hf") == []
    assert json.loads((folder / "nemo/certificate.json").read_text())["not_tuned"] == sorted(heads(folder / "hf"))


def test_merge_and_fp8_leave_the_head_and_say_so(folder: Path):
    base = heads(folder / "hf")
    # Round the two layers 4; of attention 4 and a norm; of 8 experts 16, shared ones 2, of the router 2, and a norm.
    assert len(base) == 4 + 5 + 21
    for name in ("merged", "fp8"):
        assert same(heads(folder / name), base)
        certificate = read_certificate(folder / name)
        assert certificate["not_tuned"] == sorted(base)
        assert {certificate["tensors"][tensor]["what"] for tensor in base} == {"identical"}
        assert (
            f"its {len(base)} tensors (`mtp.*`) are the base's, not tuned"
            in (folder / name / "model_card.md").read_text()
        )
    assert verify(folder / "merged", folder / "hf") == []
    assert verify(folder / "fp8", folder / "merged") == []


def test_readers_of_the_fp8_folder_do_not_quantize_the_head(folder: Path):
    excluded = json.loads((folder / "fp8/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert lint(folder / "fp8") == []
    for module in ("mtp.layers.0.eh_proj", "mtp.layers.1.mixer.experts.3.up_proj"):
        assert vllm_excludes(module, excluded)
        assert tensorrt_excludes(module, excluded)
    dequantize(folder / "fp8", folder / "plain")
    assert same(heads(folder / "plain"), heads(folder / "hf"))


def test_transformers_answers_with_the_model_alone(folder: Path):
    tokens = torch.arange(3, 20)[None]
    shutil.copytree(folder / "hf", folder / "without")
    config = {name: value for name, value in TINY_CONFIG.items() if name not in MTP_CONFIG}
    (folder / "without/config.json").write_text(json.dumps(config))
    with torch.no_grad():
        with_head, without = (load_reference(folder / name, torch.float32)(tokens).logits for name in ("hf", "without"))
    assert torch.equal(with_head, without)


def test_a_head_that_changed_is_named(folder: Path, tmp_path: Path):
    """A certificate whose hashes were made to fit a changed head contradicts itself."""
    content = read_certificate(folder / "merged")
    name = "mtp.layers.0.eh_proj.weight"
    content["tensors"][name]["output"]["sha256"] = "0" * 64
    shutil.copytree(folder / "merged", tmp_path / "swapped")
    (tmp_path / "swapped/certificate.json").write_text(certificate_text(sealed(content)))
    assert any(
        f"what is not tuned is not that of the input: {name}" in problem for problem in verify(tmp_path / "swapped")
    )
    del content["not_tuned"]
    (tmp_path / "swapped/certificate.json").write_text(certificate_text(sealed(content)))
    assert any("mtp.* are not those that the certificate names" in problem for problem in verify(tmp_path / "swapped"))


def test_refused_where_config_and_files_disagree(tmp_path: Path):
    whole = tiny_hf_folder(tmp_path / "whole", **MTP_CONFIG)
    tensors = load_file(whole / "model.safetensors")
    save_file(tensors, tmp_path / "whole/model.safetensors", {"format": "pt"})
    (whole / "config.json").write_text(json.dumps(TINY_CONFIG))
    with pytest.raises(UserError, match=r"holds mtp\.layers.*which its config\.json does not have"):
        to_nemo(whole, tmp_path / "nemo", context=False)
    plain = tiny_hf_folder(tmp_path / "plain")
    (plain / "config.json").write_text(json.dumps(TINY_CONFIG | MTP_CONFIG))
    with pytest.raises(UserError, match=r"there is no tensor mtp.*get the published folder, or set the field to 0"):
        to_nemo(plain, tmp_path / "nemo", context=False)
