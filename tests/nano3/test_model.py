"""The model in Megatron-Core against plain Hugging Face, document by document."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.hf_to_nemo import convert
from conversion.merge_lora import merge
from evaluation.hf_model import load_reference
from tests.helpers.rank_server import done_by
from tests.helpers.tiny import DENSE, tiny_hf_folder

LENGTHS = (7, 1, 12, 20)
"""As in tests/helpers/model_probe.py, which only its own process may import."""
EVERYTHING_FP32 = {"": "F32"}


CONFIGS = {"tiny": {}, "odd": {"vocab_size": 133, "hybrid_override_pattern": "M-*EM"}, "dense": DENSE}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, Path]:
    """Results of tests/helpers/model_probe.py, the Hugging Face folder, and the adapter folder."""
    folder = tmp_path_factory.mktemp("model")
    source = tiny_hf_folder(folder / "hf", dtypes=EVERYTHING_FP32, **request.param)
    convert(source, folder / "nemo", context=False)
    out = folder / "out.safetensors"
    done_by("tests.helpers.model_probe", folder / "nemo", folder / "adapter", out)
    return load_file(out), source, folder / "adapter"


def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Hugging Face's logits, one document at a time."""
    model = load_reference(folder, torch.float32)
    with torch.no_grad():
        return torch.cat([model(document[None]).logits[0] for document in tokens.split(LENGTHS)])


def test_logits_of_packed_documents_equal_transformers_one_by_one(probe):
    results, source, _ = probe
    expected = reference_logits(source, results["tokens"])
    vocabulary = expected.shape[1]
    assert (results["base"][:, :vocabulary] - expected).abs().max() < 1e-4
    assert (results["base"][:, vocabulary:] == torch.finfo(torch.float32).min).all()  # padding has no probability


def test_documents_do_not_leak_into_each_other(probe):
    results, _, _ = probe
    start, stop = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    gradient = results["leak.gradient"]
    assert torch.count_nonzero(gradient[:start]) == 0
    assert torch.count_nonzero(gradient[stop:]) == 0
    assert torch.count_nonzero(gradient[start : stop - 1]) > 0
    assert results["leak.moved"] < 1e-6


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_equals_its_merge(probe, tmp_path):
    results, source, adapter = probe
    assert torch.equal(results["fresh"], results["base"])
    assert (results["adapted"] - results["base"]).abs().max() > 0.1
    merge(source, adapter, tmp_path / "merged")
    merged = reference_logits(tmp_path / "merged", results["tokens"])
    assert (results["adapted"][:, : merged.shape[1]] - merged).abs().max() < 1e-5


def test_a_router_that_moves_is_noticed_and_mixed_precision_does_not_move_it(probe):
    assert probe[0]["guard"]
    assert probe[0]["cast"]
