"""merge_lora.py --nemo and NeMo checkpoints as base: the same model, bit for bit, whichever way it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conversion import hf_to_nemo, merge_lora, nemo_to_hf
from conversion.certificates.certificate_json import read_certificate
from conversion.certify import verify
from conversion.checkpoint import pieces, torch_dist_writer
from conversion.checkpoint.model_folder import NemoFolder
from conversion.merge_lora import merge
from nano3.checkpoints.base_identity import recorded_sha256
from tests.conversion.test_conversion import tree
from tests.conversion.test_merge import write_adapter
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder

VOCABULARY = 100
"""Padded to 128 in Megatron."""


def randomize(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for value in tensors.values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` in BF16, an `adapter` on everything with its own for each expert, `merged` as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("merge")
    config: dict[str, Any] = TINY_CONFIG | {"vocab_size": VOCABULARY}
    tiny_hf_folder(folder / "base", vocab_size=VOCABULARY, shards=2)
    write_adapter(folder / "adapter", randomize, experts="each", config=config)
    merge(folder / "base", folder / "adapter", folder / "merged")
    return folder


@pytest.mark.parametrize("chunk_bytes", [pieces.CHUNK_BYTES, 2000])
def test_a_merged_nemo_checkpoint_exports_to_the_merged_folder(folders, tmp_path, monkeypatch, chunk_bytes):
    for module in (pieces, hf_to_nemo, merge_lora):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    merge(folders / "base", folders / "adapter", tmp_path / "nemo", nemo=True, context=False)
    assert verify(tmp_path / "nemo", folders / "base") == []  # the sizes of the changes too
    told, expected = read_certificate(tmp_path / "nemo"), read_certificate(folders / "merged")
    assert told["output"] == expected["output"]
    assert told["totals"] == expected["totals"]
    assert told["totals"]["changed"] > 0
    assert recorded_sha256(tmp_path / "nemo") == expected["output"]["sha256"]  # what a run on it passes on
    nemo_to_hf.convert(tmp_path / "nemo", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folders / "merged")
    assert verify(tmp_path / "back", folders / "base") == []
    kinds = [link["kind"] for link in (read_certificate(tmp_path / "back"), told)]
    assert kinds == ["export", "merge"]


def test_a_nemo_checkpoint_as_base(folders, tmp_path):
    hf_to_nemo.convert(folders / "base", tmp_path / "base", context=False)
    merge(tmp_path / "base", folders / "adapter", tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(folders / "merged")
    assert verify(tmp_path / "merged", folders / "base") == []
    assert verify(tmp_path / "merged", tmp_path / "base") == []
    merge(tmp_path / "base", folders / "adapter", tmp_path / "nemo", nemo=True, context=False)
    after = load_file(folders / "merged/model-00001-of-00002.safetensors")
    with NemoFolder(tmp_path / "nemo") as nemo:
        for name, value in after.items():
            assert nemo.rows(name, 0, len(value)).equal(value), name


def test_a_killed_merge_goes_on_and_certifies_the_same(folders, tmp_path, monkeypatch):
    """Killed when all weights are written: the sizes of the changes, which went by then, are computed again."""
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 20_000)
    written: list[str] = []
    write_file = torch_dist_writer._write_file
    monkeypatch.setattr(
        torch_dist_writer, "_write_file", lambda path, *rest: (written.append(path.name), write_file(path, *rest))[1]
    )

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge_lora, "write_certificate", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(folders / "base", folders / "adapter", tmp_path / "nemo", nemo=True, context=False)
    assert not (tmp_path / "nemo").exists()
    assert len(written) > 3
    written.clear()
    merge(folders / "base", folders / "adapter", tmp_path / "nemo", nemo=True, context=False)
    assert written == []
    assert verify(tmp_path / "nemo", folders / "base") == []
