"""Transformer Engine's `_extra_state` keys: recorded from its sources, demanded by strict loads, in both directions.

tests/helpers/te_extra_state.json records which modules of the stock `mamba_stack_spec` carry one, on which class of
Transformer Engine each is built, where that class defines it, and the bytes of one that an FP8 run saves.
"""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
import pickletools
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conversion.checkpoint.plan import make_plan
from conversion.hf_to_nemo import convert
from conversion.nemo_to_hf import convert as to_hf
from data_prep.packing import build_packs
from finetune.settings import LogSettings, LoraSettings, Settings, TrainSettings
from nano3.arch import Arch
from nano3.token_store import TokenStore
from tests.helpers.rank_server import done_by
from tests.helpers.te_wheel import Wheel
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_run import metrics, run, write_run
from tests.helpers.tiny_store import tiny_store
from tests.nano3.test_te_signatures import wheel as te_wheel

RECORD: dict[str, Any] = json.loads((Path(__file__).parents[1] / "helpers" / "te_extra_state.json").read_text())
PATTERN = "ME*-"
EXPERTS = 8
wheel = te_wheel


def recorded(pattern: str) -> dict[str, str]:
    """Module path -> class, of a model with this pattern."""
    modules = {
        f"decoder.layers.{number}.{name}": owner
        for number, letter in enumerate(pattern)
        for name, owner in RECORD["modules"][letter].items()
    }
    return modules | RECORD["modules"][""]


def objects(pattern: str) -> list[str]:
    """Keys of a checkpoint: grouped layers have one for each expert, and attention kernels none."""
    found = []
    for path, owner in recorded(pattern).items():
        if owner in RECORD["left_out_of_checkpoints"]:
            continue
        key = path.replace("mlp.experts.", "mlp.experts.experts.")
        count = EXPERTS if "Grouped" in owner else 1
        found += [f"module.{key}._extra_state/shard_{number}_{count}" for number in range(count)]
    return sorted(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After the probe: `hf`, `nemo`, `fp8` and `results.json`."""
    place = tmp_path_factory.mktemp("extra")
    source = tiny_hf_folder(place / "hf", dtypes={"": "F32"}, hybrid_override_pattern=PATTERN)
    convert(source, place / "nemo", context=False)
    done_by("tests.helpers.extra_state_probe", place)
    return place


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_record_is_transformer_engines(wheel: Wheel):
    """Every class defines `get_extra_state` where the record says, in the wheel of 2.10."""
    for name, owner in RECORD["defined_in"].items():
        found = wheel.find("transformer_engine.pytorch", name)
        assert found is not None
        method = wheel.method(found, "get_extra_state")
        assert method is not None, name
        assert f"{method[0].module}.{method[0].node.name}" == owner  # type: ignore[union-attr]


def test_the_record_is_megatrons():
    """Megatron-Core's wrappers derive from the recorded classes, and only the attention kernel leaves its state out."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "extensions" / "transformer_engine.py"
    source = file.read_text()
    classes = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}

    def built_on(name: str) -> str:
        if name == "TENorm":  # a function in the form of a class
            return "RMSNorm" if "te.pytorch.RMSNorm(" in (ast.get_source_segment(source, classes[name]) or "") else ""
        (base,) = (ast.unparse(node) for node in classes[name].bases)
        return base.removeprefix("te.pytorch.") if base.startswith("te.") else built_on(base)

    assert {name: built_on(name) for name in RECORD["built_on"]} == RECORD["built_on"]
    (left_out,) = RECORD["left_out_of_checkpoints"]
    body = ast.get_source_segment(source, classes[left_out]) or ""
    assert "def sharded_state_dict" in body
    assert "state_dict = {}" in body


def test_the_model_and_our_checkpoint_have_the_recorded_keys(results: dict[str, Any]):
    """The stand-ins' class names are Transformer Engine's where Megatron-Core makes them itself (the norms)."""
    expected = {
        path: RECORD["built_on"][owner] if owner == "TENorm" else owner for path, owner in recorded(PATTERN).items()
    }
    assert results["modules"] == expected
    assert results["objects"] == objects(PATTERN)
    arch = Arch.from_config(json.loads((Path(__file__).parents[2] / "nano3/presets/nano/config.json").read_text()))
    plan = make_plan(arch, {name: spec.dtype for name, spec in arch.tensors().items()})
    per_expert = [key for key in plan.objects if ".experts.experts." in key]
    assert len(per_expert) == 23 * 2 * 128  # 23 MoE layers, 2 grouped layers, 128 experts
    # 23 Mamba layers of 2, 6 attention of 2, 23 MoE of a norm and 2 shared experts' layers, the last norm, the output
    assert len(plan.objects) - len(per_expert) == 23 * 2 + 6 * 2 + 23 * 3 + 2


def test_our_checkpoint_loads_where_the_keys_are_demanded(results: dict[str, Any]):
    assert results["ours"]["extra_states"] == len(objects(PATTERN))
    assert results["ours"]["bytes"] == [0]  # what Transformer Engine writes without FP8
    assert "final_norm._extra_state" in results["spoiled"]


def test_a_checkpoint_with_fp8_state_loads_here(results: dict[str, Any]):
    """The pickle names Transformer Engine's own classes. It is never read: the object comes back empty, and the weights
    are the same."""
    content = base64.b64decode(RECORD["fp8_state"])
    named = {argument for _, argument, _ in pickletools.genops(content) if isinstance(argument, str)}
    assert {"transformer_engine.common.recipe", "DelayedScaling", "scale_fwd", "amax_history_fwd"} <= named
    assert results["state_bytes"] == len(content)
    assert results["fp8"]["bytes"] == [0]
    assert results["fp8"]["digest"] == results["ours"]["digest"] > 0


def test_it_exports_bit_for_bit(folder: Path, tmp_path: Path):
    to_hf(folder / "fp8", tmp_path / "back", folder / "hf")
    old, new = (load_file(place / "model.safetensors") for place in (folder / "hf", tmp_path / "back"))
    assert old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)


@pytest.mark.full
def test_the_recipe_trains_from_it(folder: Path, tmp_path: Path):
    """Through NeMo's own restore: the first loss is that of the checkpoint without FP8 state."""
    losses = []
    for name in ("nemo", "fp8"):
        place = tmp_path / name
        shutil.copytree(folder / "nemo", place / "nemo")
        if name == "fp8":
            shutil.rmtree(place / "nemo" / "weights")
            shutil.copytree(folder / "fp8" / "weights", place / "nemo" / "weights")
        shutil.copytree(folder / "hf", place / "hf")
        tiny_store(place / "store", documents=10, longest=30, vocab_size=128)
        build_packs(TokenStore(place / "store"), 64)
        settings = Settings(
            lora=LoraSettings(rank=4),
            train=TrainSettings(steps=1, warmup=0, global_batch=1, seq_length=64),
            log=LogSettings(tensorboard=False, wandb="off"),
        )
        losses.append(metrics(run(write_run(place, "run", 1, settings)))[0]["loss"])
    assert losses[0] == losses[1]
