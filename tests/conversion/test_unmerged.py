"""The adapter beside the base's weights, in plain transformers: what the merged model answers, without a merge."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.adapters.unmerged import with_adapter
from conversion.merge_lora import merge
from evaluation.hf_model import load_reference
from nano3.cli import UserError
from nano3.targets import PRESETS
from tests.conversion.test_merge import TINY_CONFIG, write_adapter
from tests.helpers.tiny import tiny_hf_folder

CONFIG = TINY_CONFIG | {"torch_dtype": "float32"}
KINDS: dict[str, Any] = {"format": 2, "rank_pattern": [], "alpha_pattern": [], "rslora": False, "dora": False}


def random(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    for value in tensors.values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


def logits(folder: Path, prepare: Any = None) -> torch.Tensor:
    model = load_reference(folder, torch.float32)
    if prepare is not None:
        prepare(model)
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits


@pytest.mark.parametrize(
    ("targets", "info"),
    [
        (PRESETS["all"], {"experts": "shared"}),
        (PRESETS["all"], {"experts": "each", **KINDS}),
        (("*.layers.0.mixer.in_proj", "linear_qkv"), {}),
    ],
)
def test_it_computes_what_the_merged_model_computes(tmp_path, targets, info):
    base = tiny_hf_folder(tmp_path / "base", torch_dtype="float32")
    adapter = write_adapter(tmp_path / "adapter", random, targets, config=CONFIG, **info)
    merge(base, adapter, tmp_path / "merged")
    merged, beside = logits(tmp_path / "merged"), logits(base, with_adapter(adapter, base))
    moved = (merged - logits(base)).abs().max()
    assert (merged - beside).abs().max() < 1e-4 * max(1.0, float(moved))
    assert moved > 1e-2


def test_what_is_no_added_product_is_refused(tmp_path):
    base = tiny_hf_folder(tmp_path / "base", torch_dtype="float32")
    adapter = write_adapter(tmp_path / "adapter", random, config=CONFIG, **{**KINDS, "dora": True})
    with pytest.raises(UserError, match="not a plain LoRA adapter"):
        with_adapter(adapter, base)
