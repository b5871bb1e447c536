"""Certificates of NeMo checkpoints: the same facts by the same names, and the same faults found."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conversion.certificates.certificate import Claim, write_certificate
from conversion.certify import verify
from conversion.checkpoint.model_folder import HFFolder, NemoFolder
from conversion.checkpoint.tensor_digests import content_hash, facts_of
from conversion.hf_to_nemo import convert
from nano3.tensor_names import VOCABULARY_KEYS
from tests.conversion.test_certificate import BIAS, ROUTER, Tensors, nudge, swap
from tests.helpers.tiny import tiny_hf_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and the NeMo checkpoint `nemo` of it, whose vocabulary of 100 is padded to 128."""
    folder = tmp_path_factory.mktemp("nemo")
    tiny_hf_folder(folder / "base", vocab_size=100)
    convert(folder / "base", folder / "nemo", context=False)
    with HFFolder(folder / "base") as hf:
        facts = facts_of(hf)
    write_certificate(folder / "nemo", folder / "base", facts, facts, Claim("import"))
    return folder


def test_a_nemo_checkpoint_has_the_content_hash_of_its_source(folders):
    with HFFolder(folders / "base") as hf, NemoFolder(folders / "nemo") as nemo:
        assert content_hash(facts_of(nemo)) == content_hash(facts_of(hf))
        for name, entry in hf.layout.entries.items():  # rows from the middle of q, k, v, of in_proj's sections
            start = entry.rows // 3
            assert nemo.rows(name, start, entry.rows // 2).equal(hf.rows(name, start, entry.rows // 2)), name
    assert verify(folders / "nemo", folders / "base") == []
    assert verify(folders / "nemo", folders / "nemo") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nudge("backbone.layers.3.mixer.k_proj.weight"), r"k_proj\.weight is not what"),
        (nudge(ROUTER), r"gate\.weight is not what"),
        (nudge(BIAS), "e_score_correction_bias is not what"),
        (swap, r"experts.2.up_proj.weight is not .*; it is what .*experts.5.up_proj.weight was"),
    ],
)
def test_altered_weights_are_found_out(folders, tmp_path, change, message):
    """The weights of another model under the certificate of this one."""
    shutil.copytree(folders / "base", tmp_path / "other")
    tensors: Tensors = load_file(tmp_path / "other/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "other/model.safetensors")
    convert(tmp_path / "other", tmp_path / "nemo", context=False)
    shutil.copy(folders / "nemo/certificate.json", tmp_path / "nemo")
    assert any(re.search(message, problem) for problem in verify(tmp_path / "nemo"))


def test_a_missing_expert_and_a_lost_file_are_found_out(folders, tmp_path):
    """The weights of a model with one expert less, and no weights."""
    tiny_hf_folder(tmp_path / "fewer", vocab_size=100, n_routed_experts=7)
    convert(tmp_path / "fewer", tmp_path / "nemo", context=False)
    for name in ("certificate.json", "hf/config.json"):
        shutil.copy(folders / f"nemo/{name}", tmp_path / "nemo" / name)
    assert any("has shape (7," in problem for problem in verify(tmp_path / "nemo"))
    next((tmp_path / "nemo/weights").glob("*.distcp")).unlink()
    assert any("missing or truncated" in problem for problem in verify(tmp_path / "nemo"))


def test_values_behind_the_vocabulary_are_found_out(folders, tmp_path):
    """Rows of padding are in nobody's certificate, so they must be zeros."""
    tiny_hf_folder(tmp_path / "wide", vocab_size=128)
    convert(tmp_path / "wide", tmp_path / "nemo", context=False)
    shutil.copytree(folders / "base", tmp_path / "nemo/hf", dirs_exist_ok=True)
    with NemoFolder(tmp_path / "nemo", as_is=True) as nemo:
        assert [problem.split(": ")[1].split()[0] for problem in nemo.padding_problems()] == list(VOCABULARY_KEYS)
