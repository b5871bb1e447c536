"""conversion/merge_lora.py: deltas computed by hand, what must not change, and refusals before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from conversion.checkpoint.torch_dist_writer import BACKENDS
from conversion.merge_lora import merge
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.digest import combine, layer_digest
from nano3.sealed_folder import seal
from nano3.targets import PRESETS, select, sizes
from nano3.tensor_names import adaptable, adapter_shapes
from tests.conversion.test_conversion import tree, truncate
from tests.helpers.tiny import TINY_CONFIG, tiny_hf_folder

RANK, ALPHA = 4, 8.0
FORMAT_2: dict[str, Any] = {"format": 2, "rank_pattern": [], "alpha_pattern": [], "rslora": False, "dora": False}
A = 0.125
"""Value of every element of every A: a row of B of value b then adds ALPHA / RANK * RANK * A * b = b to its row."""


def adapter_tensors(
    arch: Arch, targets: tuple[str, ...], experts: str, dora: bool = False, rank_pattern: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """A complete adapter, A constant and B zero; lengths one."""
    tensors = {}
    for path, size in sizes(select(arch, targets, experts), RANK, ALPHA, rank_pattern).items():
        linear = adaptable(arch)[path]
        prefix = f"module.{path.replace('mlp.experts', 'mlp.experts.experts')}.adapter."
        for name, shape in adapter_shapes(linear, size.rank, experts == "each", dora).items():
            value = {"linear_in": A, "linear_out": 0.0, "magnitude": 1.0}[name.split(".")[0]]
            tensors[prefix + name] = torch.full(shape, value)
    return tensors


def write_adapter(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], Any] = len,  # changes nothing
    targets: tuple[str, ...] = PRESETS["all"],
    experts: str = "shared",
    config: dict[str, Any] = TINY_CONFIG,
    **info: Any,
) -> Path:
    """An adapter folder after `change(tensors)`, written by PyTorch's own checkpoint code."""
    made = {name: info[name] for name in ("dora", "rank_pattern") if name in info}
    tensors = adapter_tensors(Arch.from_config(config), targets, experts, **made)
    change(tensors)
    dcp.save(tensors, checkpoint_id=folder / "weights", no_dist=True)
    (folder / "weights" / "metadata.json").write_text(json.dumps(BACKENDS))
    lora = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": list(targets), "experts": experts, **FORMAT_2}
    (folder / "lora.json").write_text(json.dumps(lora | {"base_config": config, "router_sha256": None} | info))
    seal(folder)
    return folder


def merged(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], **adapter: Any) -> tuple[dict, dict]:
    """Base and merged tensors of an FP32 model: additions of small powers of two show exactly."""
    base = tiny_hf_folder(tmp_path / "base", torch_dtype="float32")
    write_adapter(tmp_path / "adapter", change, config=TINY_CONFIG | {"torch_dtype": "float32"}, **adapter)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    return load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")


def check(before: dict, after: dict, expected: dict[str, torch.Tensor]) -> None:
    """`expected`: tensor name -> what was added to each row. Every other tensor must be the same bit for bit."""
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = old + expected[name][:, None] if name in expected else old
        assert torch.equal(after[name], new), name


def rows(*runs: tuple[int, float]) -> torch.Tensor:
    return torch.cat([torch.full((count,), value) for count, value in runs])


def fill(key: str, *runs: tuple[int, float]) -> Callable[[dict[str, torch.Tensor]], None]:
    """Sets the rows of one B."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].copy_(rows(*runs)[:, None].expand_as(tensors[key]))

    return change


LAYER = "module.decoder.layers.{}.{}.adapter.linear_out.weight"
HF = "backbone.layers.{}.mixer.{}.weight"


def test_zero_adapter_changes_no_file(tmp_path: Path):
    base = tiny_hf_folder(tmp_path / "base", shards=3)
    (base / "LICENSE").write_text("terms")
    summary = merge(base, write_adapter(tmp_path / "adapter"), tmp_path / "out")
    assert tree(tmp_path / "out") == tree(base)
    # 2 Mamba layers of 2 matrices, 4 in attention, 2 MoE layers of 2 matrices for 8 routed and 1 shared expert
    assert (summary.targeted, summary.changed) == (2 * 2 + 4 + 2 * 2 * 9, 0)
    assert "not compared" in str(summary)
    assert summary.total == len(Arch.load(base).tensors())


def test_in_proj_sections_land_in_their_rows(tmp_path: Path):
    sizes = {"z": 64, "x": 64, "B": 64, "C": 64, "dt": 8}
    values = {"z": 1.0, "x": 2.0, "B": 4.0, "C": 8.0, "dt": 16.0}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, size in sizes.items():
            fill(LAYER.format(2, "mixer.in_proj") + f".{name}", (size, values[name]))(tensors)

    before, after = merged(tmp_path, change)
    check(before, after, {HF.format(2, "in_proj"): rows(*((sizes[n], values[n]) for n in sizes))})


def test_qkv_rows_are_ungrouped(tmp_path: Path):
    """linear_qkv: group 0 is q 32 rows, k 16, v 16; group 1 the same. Each part must reach its own rows of q, k, v."""
    key = LAYER.format(3, "self_attention.linear_qkv")
    before, after = merged(tmp_path, fill(key, (32, 1.0), (16, 2.0), (16, 4.0), (32, 8.0), (16, 16.0), (16, 32.0)))
    check(
        before,
        after,
        {
            HF.format(3, "q_proj"): rows((32, 1.0), (32, 8.0)),
            HF.format(3, "k_proj"): rows((16, 2.0), (16, 16.0)),
            HF.format(3, "v_proj"): rows((16, 4.0), (16, 32.0)),
        },
    )


def test_every_routed_expert_gets_the_shared_delta(tmp_path: Path):
    """All 8 experts of layer 1, not those of layer 4, not the shared expert, not the router."""
    before, after = merged(tmp_path, fill(LAYER.format(1, "mlp.experts.experts.linear_fc1"), (10, 0.0), (14, 1.0)))
    delta = rows((10, 0.0), (14, 1.0))
    check(before, after, {HF.format(1, f"experts.{expert}.up_proj"): delta for expert in range(8)})


@pytest.mark.parametrize(
    ("layer", "module", "hf"),
    [
        (0, "mixer.out_proj", "out_proj"),
        (3, "self_attention.linear_proj", "o_proj"),
        (1, "mlp.shared_experts.linear_fc1", "shared_experts.up_proj"),
        (4, "mlp.shared_experts.linear_fc2", "shared_experts.down_proj"),
    ],
)
def test_plain_modules(layer: int, module: str, hf: str, tmp_path: Path):
    count = 40 if module.endswith("fc1") else 32
    before, after = merged(tmp_path, fill(LAYER.format(layer, module), (count - 1, 1.0), (1, 2.0)))
    check(before, after, {HF.format(layer, hf): rows((count - 1, 1.0), (1, 2.0))})


def test_dense_layers_and_a_pattern_of_targets(tmp_path: Path):
    config = TINY_CONFIG | {"hybrid_override_pattern": "M-", "torch_dtype": "float32"}
    base = tiny_hf_folder(tmp_path / "base", **config)
    change = fill(LAYER.format(1, "mlp.linear_fc2"), (32, 1.0))
    merge(base, write_adapter(tmp_path / "adapter", change, ("*.layers.1.*",), config=config), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    check(before, after, {HF.format(1, "down_proj"): rows((32, 1.0))})


def test_rank_columns_are_paired(tmp_path: Path):
    """Column k of B meets row k of A: A row k = k, B column k = 10**k -> alpha/rank * sum(k * 10**k) = 2 * 3210."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        prefix = "module.decoder.layers.0.mixer.out_proj.adapter."
        tensors[f"{prefix}linear_in.weight"].copy_(torch.arange(4.0)[:, None].expand(4, 64))
        tensors[f"{prefix}linear_out.weight"].copy_(10.0 ** torch.arange(4.0)[None].expand(32, 4))

    before, after = merged(tmp_path, change)
    check(before, after, {HF.format(0, "out_proj"): rows((32, 2.0 * 3210))})


def test_bf16_is_added_in_fp32_and_rounded_once(tmp_path: Path):
    base = tiny_hf_folder(tmp_path / "base")
    torch.manual_seed(0)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in (f"module.decoder.layers.0.mixer.out_proj.adapter.linear_{side}.weight" for side in ("in", "out")):
            tensors[key] = torch.randn(tensors[key].shape).to(torch.bfloat16)
        tensors[LAYER.format(2, "mixer.out_proj")].fill_(1e-30)  # too little for BF16

    summary = merge(base, write_adapter(tmp_path / "adapter", change), tmp_path / "out")
    tensors = adapter_tensors(Arch.load(base), PRESETS["all"], "shared")
    torch.manual_seed(0)
    change(tensors)
    low, high = (
        tensors[f"module.decoder.layers.0.mixer.out_proj.adapter.linear_{s}.weight"].float() for s in ("in", "out")
    )
    old, new = (load_file(f / "model.safetensors")[HF.format(0, "out_proj")] for f in (base, tmp_path / "out"))
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, (old.float() + 2.0 * (high @ low)).to(torch.bfloat16))
    assert summary.changed == 1
    assert "1 changed" in str(summary)


def test_plain_transformers_loads_the_result(tmp_path: Path):
    """No missing or unexpected weight; the merged matrix is the one in the model."""
    transformers = pytest.importorskip("transformers")
    _, after = merged(tmp_path, fill(LAYER.format(3, "self_attention.linear_proj"), (32, 1.0)))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    name = HF.format(3, "o_proj")
    assert torch.equal(
        dict(model.named_parameters())[name.replace("backbone.", f"{model.base_model_prefix}.", 1)], after[name]
    )


@pytest.mark.parametrize("rounded", [False, True])
def test_the_base_must_have_the_routers_of_the_training_run(rounded: bool, tmp_path: Path):
    """Another checkpoint of the same architecture is refused; a base trained in BF16 (routers rounded) is accepted."""
    base = tiny_hf_folder(tmp_path / "base", torch_dtype="float32", seed=1)
    other = tiny_hf_folder(tmp_path / "other", torch_dtype="float32", seed=2)
    held = load_file(base / "model.safetensors")
    digests = {}
    for layer in (1, 4):
        weight = held[HF.format(layer, "gate")]
        bias = held[f"backbone.layers.{layer}.mixer.gate.e_score_correction_bias"]
        digests[layer] = layer_digest(weight.bfloat16() if rounded else weight, bias)
    recorded = {"config": TINY_CONFIG | {"torch_dtype": "float32"}, "router_sha256": combine(digests)}
    adapter = write_adapter(tmp_path / "adapter", **recorded)
    assert merge(base, adapter, tmp_path / "out").same_routers
    with pytest.raises(UserError, match="another checkpoint of this architecture"):
        merge(other, adapter, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


IN = "module.decoder.layers.0.mixer.out_proj.adapter.linear_in.weight"
UP = "module.decoder.layers.1.mlp.experts.experts.linear_fc1.adapter.linear_out.weight"
OTHER = TINY_CONFIG | {"hybrid_override_pattern": "MEM*M"}
# "said": what lora.json says besides, or instead of, what the tensors were made for.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"config": OTHER}, "pattern: MEM[*]M != MEM[*]E"),
    "unreadable base config": ({"base_config": {"model_type": "llama"}}, "model_type"),
    "missing tensor": ({"change": lambda t: t.pop(IN)}, "lacks " + IN),
    "unknown tensor": ({"change": lambda t: t.update({"module.x": torch.zeros(1)})}, r"holds module\.x"),
    "per-expert keys": (
        {"change": lambda t: t.update({"module.decoder.layers.1.mlp.experts.experts.3.w": torch.zeros(1)})},
        r"holds module\.decoder\.layers\.1\.mlp\.experts\.experts\.3",
    ),
    "experts not announced": ({"said": {"experts": "none"}}, "mlp.experts"),
    "wrong rank": ({"rank": 8}, r"has shape \(4, 64\)|has shape \(4, 32\)"),
    "rank not a number": ({"rank": "4"}, "rank is '4'"),
    "alpha not finite": ({"alpha": float("nan")}, "alpha is nan"),
    "NaN": ({"change": lambda t: t[IN].fill_(float("nan"))}, f"{IN} holds NaN"),
    "integers": ({"change": lambda t: t.update({IN: torch.zeros(4, 64).int()})}, "known are"),
    "later format": ({"format": 3}, "format 3"),
    "without a field that decides the merge": (
        {"said": {"rank_pattern": None}},
        "rank_pattern is None; it must be a valid list",
    ),
    "format 1": ({"said": {"format": 1}}, "is of format 1; this version reads format 2"),
    "a flag that is a word": ({"said": FORMAT_2 | {"dora": "no"}}, "dora is 'no'; it must be a valid boolean"),
    "a pattern that names nothing": (
        {"said": FORMAT_2 | {"rank_pattern": ["q_proj:8"]}},
        "'q_proj:8' names no adapted layer",
    ),
    "a rank that the tensors do not have": (
        {"said": FORMAT_2 | {"rank_pattern": ["in_proj:8"]}},
        r"has shape \(4, 32\)",
    ),
    "a magnitude that is not there": ({"said": FORMAT_2 | {"dora": True}}, "magnitude"),
    "an expert less": (
        {"experts": "each", "change": lambda t: t.update({UP: t[UP][:7]})},
        r"experts\.linear_fc1\.adapter\.linear_out\.weight has shape \(7, 24, 4\)",
    ),
    "experts announced one by one": ({"said": {"experts": "each"}}, r"mlp\.experts\.experts"),
    "unknown experts": ({"said": {"experts": "some"}}, "experts is 'some'"),
    "balance without its biases": ({"router": "balance"}, "expert_bias"),
    "unknown target": ({"said": {"targets": ["q_proj"]}}, "q_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_adapters_are_refused_before_anything_is_written(case: str, tmp_path: Path):
    arguments, message = REFUSED[case]
    base = tiny_hf_folder(tmp_path / "base")
    said = arguments.get("said", {})
    adapter = write_adapter(tmp_path / "adapter", **{k: v for k, v in arguments.items() if k != "said"})
    info = json.loads((adapter / "lora.json").read_text()) | said
    (adapter / "lora.json").write_text(json.dumps(info))
    seal(adapter)
    with pytest.raises(UserError, match=message):
        merge(base, adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_broken_folders_are_refused(tmp_path: Path):
    base, adapter, out = tiny_hf_folder(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "out"
    with pytest.raises(UserError, match="overlap"):
        merge(base, adapter, base)
    with pytest.raises(UserError, match=r"no lora\.json"):
        merge(base, base, out)
    file = next((adapter / "weights").glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match="truncated"):
        merge(base, adapter, out)
    truncate(base)
    with pytest.raises(UserError, match="truncated"):
        merge(base, adapter, out)
    assert not out.exists()
