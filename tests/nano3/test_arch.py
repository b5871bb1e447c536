"""nano3.arch: the published numbers of Nano-30B-A3B, and every config field used, known to be harmless, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nano3.arch import PRESETS, Arch, TensorSpec, resolve_model
from nano3.cli import UserError
from nano3.hf_config import FIXED
from tests.helpers.tiny import DENSE, MTP_CONFIG, TINY_CONFIG


def arch(**overrides: Any) -> Arch:
    return Arch.from_config(TINY_CONFIG | overrides)


def test_nano_counts_are_the_published_ones():
    nano = Arch.load(PRESETS["nano"])
    assert nano.parameters == 31_577_937_344
    assert nano.active_parameters == 3_580_073_408
    assert len(nano.tensors()) == 6243
    assert nano.parameter_count() == {
        "embedding": 352_321_536,
        "lm_head": 352_321_536,
        "mamba": 891_070_784,
        "attention": 140_378_112,
        "routed_experts": 29_374_808_064,
        "shared_experts": 458_981_376,
        "router": 7_913_472,
        "router_bias": 2_944,
        "norms": 142_464,
    }


def test_nano_layers():
    nano = Arch.load(PRESETS["nano"])
    assert [len(nano.layers_of(letter)) for letter in "ME*-"] == [23, 23, 6, 0]
    assert nano.attention_layers == (5, 12, 19, 26, 33, 42)
    assert nano.feeding_mamba_layers == (4, 11, 18, 25, 32, 41)
    assert dict(nano.mamba_sections) == {"z": 4096, "x": 4096, "B": 1024, "C": 1024, "dt": 64}
    tensors = nano.tensors()
    assert tensors["backbone.layers.0.mixer.in_proj.weight"].shape == (10304, 2688)
    assert tensors["backbone.layers.0.mixer.conv1d.weight"].shape == (6144, 1, 4)
    assert tensors["backbone.layers.5.mixer.k_proj.weight"].shape == (256, 2688)
    assert tensors["backbone.layers.1.mixer.gate.e_score_correction_bias"] == TensorSpec((128,), "F32", "router_bias")


def test_only_the_layer_right_before_attention_feeds_it():
    assert arch(hybrid_override_pattern="M*EM*-*").feeding_mamba_layers == (0, 3)
    assert arch(hybrid_override_pattern="*ME*").feeding_mamba_layers == ()


def test_dense_mlp_layers():
    tensors = arch(hybrid_override_pattern="M-").tensors()
    assert tensors["backbone.layers.1.mixer.up_proj.weight"].shape == (48, 32)
    assert tensors["backbone.layers.1.mixer.down_proj.weight"].shape == (32, 48)


def test_the_names_are_those_of_transformers(tmp_path: Path):
    """What transformers saves (config.json rewritten, infinities as objects) is read back as the same architecture."""
    transformers = pytest.importorskip("transformers")
    config = {k: v for k, v in TINY_CONFIG.items() if k != "torch_dtype"} | {"hybrid_override_pattern": "ME*-"}
    model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**config, dtype="bfloat16"))
    model.to(dtype=__import__("torch").bfloat16).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "hybrid_override_pattern" not in written
    assert written["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert Arch.load(tmp_path) == arch(hybrid_override_pattern="ME*-")
    from conversion.checkpoint.safetensors_layout import FileLayout

    found = {name: entry.shape for name, entry in FileLayout.read(tmp_path).entries.items()}
    assert found == {name: spec.shape for name, spec in Arch.load(tmp_path).tensors().items()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("conv_kernel", 3),
        ("hidden_dropout", 0.1),
        ("mamba_hidden_act", "relu"),
        ("mamba_proj_bias", True),
        ("mlp_bias", True),
        ("mlp_hidden_act", "silu"),
        ("moe_latent_size", 16),
        ("n_group", 2),
        ("n_shared_experts", 2),
        ("norm_topk_prob", False),
        ("norm_topk_prob", 1),
        ("num_nextn_predict_layers", -1),
        ("quantization_config", {"quant_method": "modelopt"}),
        ("residual_in_fp32", True),
        ("sliding_window", 128),
        ("tie_word_embeddings", True),
        ("time_step_limit", [0.0, 1.0]),
        ("topk_group", 2),
        ("use_bias", True),
        ("use_conv_bias", False),
        ("hidden_size", "32"),
        ("hidden_size", 0),
        ("num_attention_heads", True),
        ("num_hidden_layers", 6),
        ("torch_dtype", "float8"),
        ("hybrid_override_pattern", "MEX*E"),
        ("layers_block_type", ["moe"]),
        ("layers_block_type", ["mamba", "moe", "mamba", "rnn", "moe"]),
        ("n_groups", 3),
        ("num_key_value_heads", 3),
        ("num_experts_per_tok", 9),
        ("norm_eps", 1e-6),
        ("rotary_scaling", 2),
    ],
)
def test_unsupported_values_are_refused_by_name(field: str, value: Any):
    named = {"hybrid_override_pattern": "layer pattern"}.get(field, field)
    named = "quantized" if field == "quantization_config" else "dtype" if field == "torch_dtype" else named
    with pytest.raises(UserError, match=named):
        arch(**{field: value})


def test_super_is_refused_for_its_latent_experts():
    with pytest.raises(
        UserError, match=r"moe_latent_size is 1024; .*: the experts of Nemotron-3-Super work in a narrower"
    ):
        arch(moe_latent_size=1024, num_experts_per_tok=22, **MTP_CONFIG)


def test_heads_of_multi_token_prediction_are_no_part_of_the_network():
    with_head = arch(**MTP_CONFIG)
    assert with_head.num_nextn_predict_layers == 1
    assert with_head.tensors() == arch().tensors()


def test_every_fixed_field_has_a_test_of_its_refusal():
    marks = test_unsupported_values_are_refused_by_name.pytestmark  # type: ignore[attr-defined]
    assert FIXED.keys() <= {field for field, _ in marks[0].args[1]}


@pytest.mark.parametrize("field", ["hidden_size", "model_type", "hybrid_override_pattern", "routed_scaling_factor"])
def test_missing_fields_are_refused_by_name(field: str):
    with pytest.raises(UserError, match=field):
        Arch.from_config({name: value for name, value in TINY_CONFIG.items() if name != field})


def test_an_unknown_field_names_its_nearest():
    with pytest.raises(UserError, match=r"hidden_sizes.*nearest known field: hidden_size"):
        arch(hidden_sizes=3)


def test_what_other_tools_leave_in_a_config_does_not_matter():
    """Labels, and fields that are null: not given."""
    plain = arch()
    labelled = arch(unsloth_fixed=True, unsloth_version="2026.11", id2label={"0": "a"}, label2id={"a": 0}, moe_new=None)
    assert labelled.differences(plain) == []
    with pytest.raises(UserError, match="unknown field 'moe_new'"):
        arch(moe_new=1)


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors", "letters"),
    [
        ("nano-4b", 3_973_556_832, 263, {"M": 21, "-": 17, "*": 4}),
        ("nano-9b-v2", 8_888_227_328, 341, {"M": 27, "-": 25, "*": 4}),
        ("nano-12b-v2", 12_310_001_152, 369, {"M": 28, "-": 28, "*": 6}),
        ("nemotron-h-8b", 8_100_852_736, 311, {"M": 24, "-": 24, "*": 4}),
    ],
)
def test_the_dense_members_count_as_published(preset: str, parameters: int, tensors: int, letters: dict[str, int]):
    """Every layer has a norm; beside it M has 8 tensors, * 4, - 2; and three tensors belong to no layer."""
    dense = Arch.load(PRESETS[preset])
    assert {letter: len(dense.layers_of(letter)) for letter in letters} == letters
    assert sum({"M": 9, "*": 5, "-": 3}[letter] for letter in dense.pattern) + 3 == tensors
    assert len(dense.tensors()) == tensors
    assert dense.parameters == dense.active_parameters == parameters
    assert dense.head_dim == 128


def test_a_dense_model_has_no_sizes_of_experts():
    """Absent, null, or transformers' defaults, which say nothing about it: one architecture."""
    absent = {name: value for name, value in (TINY_CONFIG | DENSE).items() if value is not None}
    dense = Arch.from_config(absent)
    assert (dense.n_routed_experts, dense.routed_scaling_factor) == (0, 0.0)
    assert Arch.from_config(absent | {"n_routed_experts": 8, "num_experts_per_tok": 9}) == dense
    assert Arch.from_config(absent | {"moe_intermediate_size": None}) == dense


def test_second_names_of_a_field_stand_for_it():
    config = {name: value for name, value in TINY_CONFIG.items() if name != "head_dim"}
    assert Arch.from_config(config | {"attention_head_dim": 16}) == arch()
    assert arch(attention_head_dim=16, num_query_groups=2, norm_eps=1e-5) == arch()
    with pytest.raises(UserError, match="attention_head_dim 8 and head_dim 16 disagree; remove one"):
        arch(attention_head_dim=8)


def test_config_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json"):
        Arch.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Arch.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list; it must be an object"):
        Arch.load(tmp_path / "config.json")


def test_presets_and_paths(tmp_path: Path):
    assert resolve_model("nano") == PRESETS["nano"]
    with pytest.raises(UserError, match="neither a preset"):
        resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_differences_name_the_fields():
    assert arch().differences(arch(torch_dtype="float32")) == []
    assert arch().differences(arch(n_groups=2)) == ["n_groups: 4 != 2"]


def test_neither_torch_nor_nemo_is_imported():
    code = "import sys, nano3.arch, conversion.checkpoint.model_folder; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
