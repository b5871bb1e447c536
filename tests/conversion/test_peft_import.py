"""Adapters that Hugging Face PEFT made: merged and imported; and what is refused before anything is written."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.adapter import export, import_peft
from conversion.adapters.adapter_folder import Adapter
from conversion.merge_lora import merge
from evaluation.hf_model import load_reference
from finetune.initial import adopt
from finetune.settings import LoraSettings
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.sealed_folder import seal
from nano3.targets import PRESETS
from tests.conversion.test_merge import write_adapter
from tests.conversion.test_peft_export import FP32, logits
from tests.helpers.legacy_model import LegacyModel
from tests.helpers.tiny import tiny_hf_folder

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.up_proj", "experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["in_proj"], "target_parameters": EXPERTS},
    "down alone": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "rslora": {"target_modules": [*LINEAR, "embeddings"], "target_parameters": EXPERTS, "use_rslora": True},
    "dora": {"target_modules": [*LINEAR, "lm_head"], "use_dora": True},
    "q alone louder": {"target_modules": LINEAR, "alpha_pattern": {"q_proj": 24.0}},  # four times the scale of k and v
    "patterns": {
        "target_modules": LINEAR,
        "target_parameters": EXPERTS,
        "rank_pattern": {"k_proj": 2, r"layers\.0\.mixer\.in_proj": 8, "experts.up_proj": 3},
        "alpha_pattern": {"k_proj": 3.0, "down_proj": 5},  # k_proj: the scale of q and v, 6 / 4
    },
}
"""`peft.LoraConfig`'s arguments."""


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def foreign(base: Path, out: Path, legacy: bool = False, **arguments: Any) -> torch.Tensor:
    """An adapter that PEFT saves, and its logits there."""
    model: Any = load_reference(base, torch.float32)
    model = LegacyModel(model) if legacy else model
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **arguments))
    randomize(model)
    model.save_pretrained(out)
    return logits(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("base") / "hf", torch_dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_merges_give_the_logits_of_peft(kind: str, base: Path, tmp_path: Path):
    """Straight from PEFT's folder and from the imported one: the same file; only targets changed."""
    expected = foreign(base, tmp_path / "peft", **KINDS[kind])
    summary = merge(base, tmp_path / "peft", tmp_path / "merged")
    assert (logits(load_reference(tmp_path / "merged", torch.float32)) - expected).abs().max() < 1e-5
    assert "not compared" in str(summary)
    imported = import_peft(tmp_path / "peft", base, tmp_path / "adapter")
    k_alone = kind == "q and v"  # linear_qkv has k too, whose rows of B are zero
    assert summary.changed + k_alone == summary.targeted == len(imported.contributions())
    assert merge(base, tmp_path / "adapter", tmp_path / "again").same_routers  # the import recorded the base's
    file = "model.safetensors"
    assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert imported.info.dora == (kind == "dora")


def test_the_older_names_import_with_out_proj(base: Path, tmp_path: Path):
    """Every linear layer of the older code, experts one by one; PEFT did not refuse out_proj then."""
    expected = foreign(base, tmp_path / "peft", legacy=True, target_modules=[*LINEAR, "out_proj"])
    keys = load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
    assert "base_model.model.backbone.layers.1.mixer.experts.7.down_proj.lora_B.weight" in keys
    merge(base, tmp_path / "peft", tmp_path / "merged")
    assert (logits(load_reference(tmp_path / "merged", torch.float32)) - expected).abs().max() < 1e-5


def test_what_an_import_says_of_itself(base: Path, tmp_path: Path):
    """q, k and v have an A each: rank 4 + 2 + 4, their scale, 6 / 4, kept; layers that are alike have one name."""
    foreign(base, tmp_path / "peft", **KINDS["patterns"])
    import_peft(tmp_path / "peft", base, tmp_path / "adapter")
    lora = json.loads((tmp_path / "adapter" / "lora.json").read_text())
    assert (lora["format"], lora["rank"], lora["experts"], lora["dora"]) == (2, 4, "each", False)
    assert lora["base_config"] == json.loads((base / "config.json").read_text())
    assert "*.self_attention.linear_qkv" in lora["targets"]
    assert "*.layers.0.mixer.in_proj" in lora["targets"]
    assert set(lora["rank_pattern"]) == {
        "*.self_attention.linear_qkv:10",
        "*.layers.0.mixer.in_proj:8",
        "*.mlp.experts.linear_fc1:3",
    }
    sizes = Adapter(tmp_path / "adapter", Arch.load(base)).sizes
    assert sizes["decoder.layers.3.self_attention.linear_qkv"].scale == 6 / 4
    assert sizes["decoder.layers.0.mixer.in_proj"].scale == 6 / 8
    assert sizes["decoder.layers.1.mlp.experts.linear_fc1"].scale == 6 / 3
    assert sizes["decoder.layers.1.mlp.experts.linear_fc2"].scale == 5 / 4
    foreign(base, tmp_path / "rslora", **KINDS["rslora"])
    import_peft(tmp_path / "rslora", base, tmp_path / "second")
    sizes = Adapter(tmp_path / "second", Arch.load(base)).sizes
    assert math.isclose(sizes["decoder.layers.3.self_attention.linear_qkv"].scale, 6 / 2, rel_tol=1e-15)


def config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    change(held)
    save_file(held, path)


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


UP = "base_model.model.model.layers.1.mixer.shared_experts.up_proj"
IN = "base_model.model.model.layers.0.mixer.in_proj"
Q = "base_model.model.model.layers.3.mixer.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (truncated, r"adapter_model\.safetensors is truncated"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json: not valid JSON"),
    "another rank": (lambda f: config(f, r=8), r"has shape \(4, .* rank 8"),
    "a rank of one layer": (lambda f: config(f, rank_pattern={"in_proj": 2}), f"{IN}.* rank 2"),
    "another base": (
        lambda f: tensors(f, lambda t: t.update({f"{UP}.lora_B.weight": torch.zeros(48, 4)})),
        r"shared_experts\.up_proj\.lora_B\.weight has shape \(48, 4\)",
    ),
    "a module of another model": (
        lambda f: tensors(
            f, lambda t: t.update({f"{UP.replace('up_proj', 'gate_proj')}.lora_A.weight": torch.ones(4)})
        ),
        r"adapts model\.layers\.1\.mixer\.shared_experts\.gate_proj",
    ),
    "a layer too many": (
        lambda f: tensors(f, lambda t: t.update({k.replace("layers.0", "layers.9"): t[k].clone() for k in list(t)})),
        r"adapts model\.layers\.9",
    ),
    "A without B": (
        lambda f: tensors(f, lambda t: t.pop(f"{UP}.lora_B.weight")),
        "has lora_A; adapter_config.json requires lora_A, lora_B",
    ),
    "NaN": (lambda f: tensors(f, lambda t: t[f"{IN}.lora_A.weight"].fill_(math.nan)), "in_proj.* holds NaN"),
    "an unknown tensor": (lambda f: tensors(f, lambda t: t.update({"x": torch.ones(1)})), "holds x, which is no"),
    "integers": (
        lambda f: tensors(f, lambda t: t.update({k: t[k].int() for k in t if k.startswith(IN)})),
        "in_proj is I32",
    ),
    "q and k of two scales": (
        lambda f: config(f, alpha_pattern={"q_proj": 7}),
        r"q_proj and model\.layers\.3\.mixer\.k_proj .* differ in scale: 1\.75 and 1\.5",
    ),
    "another method": (lambda f: config(f, peft_type="LOHA"), "peft_type 'LOHA'"),
    "biases": (lambda f: config(f, bias="all"), "bias='all'"),
    "whole modules": (lambda f: config(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "PiSSA": (lambda f: config(f, init_lora_weights="pissa"), "path_initial_model_for_weight_conversion"),
    "a list of patterns": (lambda f: config(f, rank_pattern=["q_proj"]), "rank_pattern is .* it must be an object"),
    "a pattern that is none": (lambda f: config(f, rank_pattern={"(": 4}), "no regular expression"),
    "DoRA without lengths": (lambda f: config(f, use_dora=True), "lora_magnitude_vector"),
    "one of the stacked matrices": (
        lambda f: tensors(f, lambda t: [t.pop(k) for k in list(t) if ".experts.base_layer." in k]),
        "one adapter for model.layers.1.mixer.experts",
    ),
}


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter that is right."""
    folder = tmp_path_factory.mktemp("good") / "peft"
    foreign(base, folder, target_modules=LINEAR, target_parameters=EXPERTS)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_peft_adapters_are_refused_before_anything_is_written(case: str, good: Path, base: Path, tmp_path: Path):
    change, message = REFUSED[case]
    shutil.copytree(good, tmp_path / "peft")
    change(tmp_path / "peft")
    with pytest.raises(UserError, match=message):
        merge(base, tmp_path / "peft", tmp_path / "out")
    with pytest.raises(UserError, match=message):
        import_peft(tmp_path / "peft", base, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["peft"]


def test_a_missing_expert_is_refused_by_name(base: Path, tmp_path: Path):
    foreign(base, tmp_path / "peft", legacy=True, target_modules=["up_proj"])
    lost = "base_model.model.backbone.layers.4.mixer.experts.5.up_proj"
    tensors(tmp_path / "peft", lambda held: [held.pop(key) for key in list(held) if key.startswith(lost)])
    with pytest.raises(UserError, match=r"lacks the adapters of experts\.5 of decoder\.layers\.4\.mlp\.experts"):
        merge(base, tmp_path / "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_checkpoint_of_the_same_architecture(base: Path, tmp_path: Path):
    """What our export knows of its base tells, and for a foreign adapter the base weights that PEFT stored along."""
    other = tiny_hf_folder(tmp_path / "other", torch_dtype="float32", seed=5)
    foreign(base, tmp_path / "peft", target_modules=["lm_head"])
    assert any("base_layer" in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    with pytest.raises(UserError, match=r"is not the base's (lm_head|backbone\.embeddings)"):
        merge(other, tmp_path / "peft", tmp_path / "out")
    import_peft(tmp_path / "peft", base, tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "exported", "peft")
    with pytest.raises(UserError, match=r"another (base|checkpoint)"):
        merge(other, tmp_path / "exported", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_was_edited_is_refused(base: Path, tmp_path: Path):
    export(write_adapter(tmp_path / "adapter", config=FP32, targets=PRESETS["peft"]), tmp_path / "peft", "peft")
    config(tmp_path / "peft", lora_alpha=16)
    with pytest.raises(UserError, match=r"adapter_config\.json has .* bytes and should have"):
        merge(base, tmp_path / "peft", tmp_path / "out")
    seal(tmp_path / "peft")
    with pytest.raises(UserError, match=r"the scale 4, the header of adapter_model\.safetensors 2"):
        merge(base, tmp_path / "peft", tmp_path / "out")


def test_starting_from_an_adapter_takes_its_kind(tmp_path: Path):
    folder = write_adapter(tmp_path / "adapter", config=FP32, targets=PRESETS["attention"], experts="none")
    lora = LoraSettings(init_from=os.path.relpath(folder))
    adopt(lora)
    assert (lora.rank, lora.alpha, lora.experts) == (4, 8.0, "none")
    assert lora.chosen_targets() == list(PRESETS["attention"])
    assert lora.init_from == str(folder)
    adopt(LoraSettings(init_from=str(folder), rank=4, preset="attention"))  # given, and the same
    for wrong in ({"rank": 16}, {"preset": "peft"}, {"dora": True}):
        with pytest.raises(UserError, match="leave lora"):
            adopt(LoraSettings(init_from=str(folder), **wrong))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"lora\.json"):
        adopt(LoraSettings(init_from=str(tmp_path)))
