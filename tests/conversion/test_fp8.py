"""Selective FP8: what is chosen, codes and scales against ModelOpt's own export, who would misread a folder."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.checkpoint.safetensors_layout import FileLayout
from conversion.dequantize import dequantize, values
from conversion.fp8.readers import sglang_excludes, tensorrt_excludes, vllm_excludes
from conversion.fp8.selection import Selection
from conversion.lint_export import lint
from conversion.quantize_fp8 import quantize, to_codes
from evaluation.hf_model import load_reference
from nano3.arch import PRESETS, Arch, resolve_model
from nano3.cli import UserError
from nano3.sealed_folder import seal
from nano3.token_store import tokenizer_sha256
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_store import tiny_store

PATTERN = "MEM*EME"
KEPT_LAYERS = (2, 3)
PICO_KEPT = (2, 3, 7)
"""Pico's layers are MEM*EME*E: attention, and the one Mamba layer right before it."""


def samples() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 128, length) for length in (32, 17, 64)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, a tiny model, and `fp8`, its quantized checkpoint."""
    folder = tmp_path_factory.mktemp("fp8")
    source = tiny_hf_folder(folder / "hf", hybrid_override_pattern=PATTERN)
    found = quantize(source, folder / "fp8", Selection.published(Arch.load(source)), samples())
    assert found.tokens == 113
    return folder


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pico, quantized."""
    folder = tmp_path_factory.mktemp("pico") / "fp8"
    quantize(PRESETS["pico"], folder, Selection.published(Arch.load(PRESETS["pico"])), samples())
    return folder


def modelopt_export(source: Path, out: Path, kept: tuple[int, ...]) -> Path:
    """ModelOpt's own way: the whole model in memory, its quantizers, its export."""
    from modelopt.torch.export import export_hf_checkpoint

    export_hf_checkpoint(modelopt_model(source, kept), export_dir=out)
    return out


def modelopt_model(source: Path, kept: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Any:
    """The whole model in memory with ModelOpt's calibrated quantizers, which round weights, inputs and cache."""
    import modelopt.torch.quantization as mtq

    model = load_reference(source, dtype)
    config: Any = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"] += [{"quantizer_name": f"*layers.{n}.mixer.*_proj*", "enable": False} for n in kept]
    config["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]

    def forward(module: Any) -> None:
        with torch.no_grad():
            for sample in samples():
                module(torch.from_numpy(sample)[None])

    return mtq.quantize(model, config, forward)


def test_nano_by_the_published_recipe():
    arch = Arch.load(PRESETS["nano"])
    selection = Selection.published(arch)
    assert len(selection.chosen) == 5968
    assert selection.kv_layers == (5, 12, 19, 26, 33, 42)
    kept = {int(name.split(".")[2]) for name in selection.excluded if name.endswith("in_proj")}
    assert kept == {4, 11, 18, 25, 32, 41}
    assert sum(name.endswith(".conv1d") for name in selection.excluded) == 23
    dtypes = {name: spec.dtype for name, spec in arch.tensors().items()}
    layout = FileLayout.make(selection.table(dtypes))
    assert layout.total_bytes == pytest.approx(32.66e9, rel=0.01)
    assert len(layout.entries) == 6243 + 2 * 5968 + 2 * 6


def test_codes_by_hand():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.bfloat16)
    scale = torch.tensor(2.0) / 448  # the largest value becomes the largest code
    assert to_codes(weight, scale).float().tolist() == [[224.0, -448.0], [112.0, 0.0]]
    assert torch.equal(values(to_codes(weight, scale), scale), weight)


def assert_equal_to_modelopts(mine: Path, theirs: Path, original: Path) -> None:
    """Every tensor but those that ModelOpt writes rounded, since transformers rounded them when it loaded the model."""
    ours, exported, source = (load_file(path / "model.safetensors") for path in (mine, theirs, original))
    assert set(ours) == set(exported)
    precise = {name for name in source if source[name].dtype == torch.float32 and "e_score" not in name}
    for name, value in ours.items():
        if name in precise:
            assert torch.equal(value, source[name]), name
            assert torch.equal(value.bfloat16(), exported[name]), name
        else:
            assert value.dtype == exported[name].dtype, name
            assert value.view(-1).view(torch.uint8).equal(exported[name].view(-1).view(torch.uint8)), name


def test_every_tensor_equals_modelopts_export(ours, tmp_path):
    modelopt_export(ours / "hf", tmp_path / "modelopt", KEPT_LAYERS)
    assert_equal_to_modelopts(ours / "fp8", tmp_path / "modelopt", ours / "hf")


def test_every_tensor_of_pico_equals_modelopts_export(pico, tmp_path):
    """The model that this repository ships, as it is: 76 of its 86 matrices become FP8."""
    modelopt_export(PRESETS["pico"], tmp_path / "modelopt", PICO_KEPT)
    assert_equal_to_modelopts(pico, tmp_path / "modelopt", PRESETS["pico"])


def test_the_lint_fails_on_modelopts_unrepaired_export_for_its_excluded_modules(ours, tmp_path):
    """Its tensors are ours here: what is wrong is the list of excluded modules, as ModelOpt 0.47 garbles it."""
    theirs = modelopt_export(ours / "hf", tmp_path / "modelopt", KEPT_LAYERS)
    shutil.copy(ours / "fp8" / "model.safetensors", theirs / "model.safetensors")
    found = lint(theirs)
    excluded = json.loads((theirs / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert all("\0" in name for name in excluded)
    for reader in ("vLLM", "SGLang", "TensorRT-LLM"):
        misread = {what.split(" is ")[0] for who, what in found if who == reader and "would be read as FP8" in what}
        layers = {f"model.layers.2.mixer.{name}" for name in ("in_proj", "out_proj")}
        assert misread == {"lm_head", *layers, *(f"model.layers.3.mixer.{name}" for name in ("qkv_proj", "o_proj"))}


def test_a_selection_of_ones_own(ours, tmp_path):
    arch = Arch.load(ours / "hf")
    (tmp_path / "a.yaml").write_text("quantize: ['*']\nkeep: ['*.layers.0.*', '*.in_proj']\nkv_cache: false\n")
    selection = Selection.from_yaml(arch, tmp_path / "a.yaml")
    assert "backbone.layers.3.mixer.q_proj" in selection.chosen
    assert not [name for name in selection.chosen if ".layers.0." in name or name.endswith("in_proj")]
    assert selection.kv_layers == ()
    quantize(ours / "hf", tmp_path / "fp8", selection, samples())
    assert lint(tmp_path / "fp8") == []
    for text, message in (
        ("quantize: ['*.nothing']", "matches none of the 64 matrices"),
        ("layers: [1]", "quantize, keep"),
        ("quantize: []", "leaves nothing to quantize"),
        ("quantize: ['*']\nkv_cache: 8", "kv_cache is 8; it must be a valid boolean"),
    ):
        (tmp_path / "b.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            Selection.from_yaml(arch, tmp_path / "b.yaml")


def test_what_is_kept_is_kept_bit_for_bit_and_experts_without_tokens_are_counted(ours, tmp_path):
    before, after = load_file(ours / "hf" / "model.safetensors"), load_file(ours / "fp8" / "model.safetensors")
    kept = [name for name in before if after[name].dtype != torch.float8_e4m3fn]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {name for name in kept if "_proj" in name} == {
        name for name in before if "_proj" in name and int(name.split(".")[2]) in KEPT_LAYERS
    }
    selection = Selection.published(Arch.load(ours / "hf"))
    found = quantize(ours / "hf", tmp_path / "fp8", selection, [np.array([5])])
    assert found.idle == {1: 6, 4: 6, 6: 6}  # one token chooses 2 of 8 experts in each layer


def test_the_plain_folder_holds_code_times_scale(ours, tmp_path):
    assert dequantize(ours / "fp8", tmp_path / "plain") == 58
    codes, plain = load_file(ours / "fp8" / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    name = "backbone.layers.1.mixer.experts.3.down_proj.weight"
    assert torch.equal(plain[name], (codes[name].float() * codes[f"{name}_scale"]).bfloat16())
    original = load_file(ours / "hf" / "model.safetensors")
    assert set(plain) == set(original)
    for name, value in original.items():  # E4M3 has 3 bits behind the leading one: 1/16 at most, less near zero
        assert (plain[name].float() - value.float()).abs().max() <= value.float().abs().max() / 16, name
    tokens = torch.from_numpy(samples()[0])[None]
    with torch.no_grad():
        both = [load_reference(path, torch.float32)(tokens).logits for path in (ours / "hf", tmp_path / "plain")]
    assert 0 < (both[0] - both[1]).abs().max() < 0.3 * both[0].abs().max()


def test_broken_input_is_refused_before_anything_is_written(ours, tmp_path):
    selection = Selection.published(Arch.load(ours / "hf"))
    shutil.copytree(ours / "hf", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["backbone.layers.5.mixer.out_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.5\.mixer\.out_proj\.weight holds NaN"):
        quantize(tmp_path / "nan", tmp_path / "out", selection, samples())
    with pytest.raises(UserError, match="quantization_config"):
        quantize(ours / "fp8", tmp_path / "out", selection, samples())
    with pytest.raises(UserError, match="no FP8 tensor"):
        dequantize(ours / "hf", tmp_path / "out")
    with pytest.raises(UserError, match="not quantized"):
        lint(ours / "hf")
    assert not (tmp_path / "out").exists()


def test_a_matrix_of_zeros_has_codes_and_a_scale(ours, tmp_path):
    shutil.copytree(ours / "hf", tmp_path / "zero")
    tensors = load_file(tmp_path / "zero" / "model.safetensors")
    name = "backbone.layers.1.mixer.experts.0.up_proj.weight"
    tensors[name].zero_()
    save_file(tensors, tmp_path / "zero" / "model.safetensors")
    quantize(tmp_path / "zero", tmp_path / "fp8", Selection.published(Arch.load(ours / "hf")), samples())
    written = load_file(tmp_path / "fp8" / "model.safetensors")
    assert written[f"{name}_scale"] == 1
    assert written[name].float().abs().max() == 0
    assert lint(tmp_path / "fp8") == []


def test_how_readers_read_a_pattern():
    for excludes in (vllm_excludes, tensorrt_excludes):
        assert excludes("model.layers.2.mixer.in_proj", ["backbone.layers.2*"])
        assert excludes("model.layers.20.mixer.in_proj", ["backbone.layers.2*"])  # the trap that exact names avoid
        assert not excludes("model.layers.20.mixer.in_proj", ["backbone.layers.2.mixer.in_proj"])
        assert excludes("model.layers.20.mixer.in_proj", ["backbone.layers.20.*"])
        assert not excludes("model.layers.20.mixer.in_proj", ["backbone.layers.2.*"])
    projections = [f"backbone.layers.3.mixer.{part}_proj" for part in "qkv"]
    for excludes in (vllm_excludes, sglang_excludes, tensorrt_excludes):
        assert excludes("model.layers.3.mixer.qkv_proj", projections)
        assert excludes("lm_head", ["lm_head"])
        assert not excludes("lm_head", ["lm_head.\0backbone.pt_name_sentinel"])


Tensors = dict[str, torch.Tensor]


def edit_excludes(folder: Path, edit: Callable[[list[str]], list[str]], both: bool = True) -> None:
    for name, keys in (("hf_quant_config.json", ("quantization", "exclude_modules")), ("config.json", None)):
        content = json.loads((folder / name).read_text())
        if keys:
            content["quantization"]["exclude_modules"] = edit(content["quantization"]["exclude_modules"])
        elif both:
            content["quantization_config"]["ignore"] = edit(content["quantization_config"]["ignore"])
        (folder / name).write_text(json.dumps(content))


EXPERT = "backbone.layers.1.mixer.experts.3.up_proj"
IN_PROJ = "backbone.layers.0.mixer.in_proj"


def nan_code(tensors: Tensors) -> None:
    tensors[f"{IN_PROJ}.weight"].view(torch.uint8)[0, 0] = 0xFF


CACHE = "backbone.layers.3.mixer"


def rename_cache_scale(tensors: Tensors) -> None:
    tensors[f"{CACHE}.qkv_proj.k_scale"] = tensors.pop(f"{CACHE}.k_proj.k_scale")


def drop_cache_scales(tensors: Tensors) -> None:
    del tensors[f"{CACHE}.k_proj.k_scale"], tensors[f"{CACHE}.v_proj.v_scale"]


FAULTS: dict[str, tuple[Callable[[Tensors], Any], str, str]] = {
    "a dropped expert": (lambda t: t.pop(f"{EXPERT}.weight"), "every reader", f"lacks {EXPERT}.weight"),
    "an expert too many": (
        lambda t: t.update({"backbone.layers.1.mixer.experts.8.up_proj.weight": torch.zeros(24, 32)}),
        "every reader",
        "experts.8",
    ),
    "a missing scale": (lambda t: t.pop(f"{IN_PROJ}.input_scale"), "every reader", "input_scale is missing"),
    "a negative scale": (lambda t: t[f"{IN_PROJ}.weight_scale"].neg_(), "every reader", "not a positive number"),
    "an infinite scale": (lambda t: t[f"{IN_PROJ}.weight_scale"].fill_(torch.inf), "every reader", "not a positive"),
    "a code that is no number": (nan_code, "every reader", f"{IN_PROJ}.weight holds 1 values"),
    "no cache scales": (drop_cache_scales, "vLLM", "1.0 would be used"),
    "no cache scales, to another reader": (drop_cache_scales, "SGLang", "1.0 would be used"),
    "a missing cache scale": (lambda t: t.pop(f"{CACHE}.v_proj.v_scale"), "vLLM", "that of the keys would be used"),
    "a missing key scale": (lambda t: t.pop(f"{CACHE}.k_proj.k_scale"), "SGLang", "refuses to load"),
    "a negative cache scale": (lambda t: t[f"{CACHE}.k_proj.k_scale"].neg_(), "every reader", "not a positive number"),
    "a cache scale under another name": (rename_cache_scale, "vLLM", "finds no place for it"),
    "an expert in BF16 among FP8 ones": (
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"].float().bfloat16()}),
        "TensorRT-LLM",
        "partly FP8",
    ),
    "A_log rounded": (
        lambda t: t.update({"backbone.layers.0.mixer.A_log": t["backbone.layers.0.mixer.A_log"].bfloat16()}),
        "every reader",
        "published model has it in F32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_lint_finds_a_fault_in_the_tensors(ours, tmp_path, fault):
    assert lint(ours / "fp8") == []
    shutil.copytree(ours / "fp8", tmp_path / "fp8")
    change, reader, message = FAULTS[fault]
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    found = lint(tmp_path / "fp8")
    assert any(who == reader and message in what for who, what in found), found


def test_the_lint_finds_a_fault_in_the_configurations(ours, tmp_path):
    shutil.copytree(ours / "fp8", tmp_path / "a")
    edit_excludes(tmp_path / "a", lambda names: [name for name in names if name != "lm_head"])
    seal(tmp_path / "a")
    assert {(who, what.split(" is ")[0]) for who, what in lint(tmp_path / "a")} == {
        ("vLLM", "lm_head"),
        ("SGLang", "lm_head"),
        ("TensorRT-LLM", "lm_head"),
    }
    shutil.copytree(ours / "fp8", tmp_path / "b")
    edit_excludes(tmp_path / "b", lambda names: [*names, "backbone.layers.5.mixer.out_proj"], both=False)
    found = [what for _, what in lint(tmp_path / "b")]
    assert any("differ in excluded modules" in what for what in found)
    assert sum("would be read as BF16" in what for what in found) == 1  # to TensorRT-LLM, which reads that file
    shutil.copytree(ours / "fp8", tmp_path / "c")
    (tmp_path / "c" / "hf_quant_config.json").unlink()
    assert any(who == "TensorRT-LLM" and "is missing" in what for who, what in lint(tmp_path / "c"))


def test_the_lint_of_a_foreign_folder(ours, tmp_path):
    """What is wrong to one reader is right to another, and so says the lint."""

    def changed(name: str, edit: Callable[[list[str]], list[str]]) -> list[tuple[str, str]]:
        shutil.copytree(ours / "fp8", tmp_path / name)
        edit_excludes(tmp_path / name, edit)
        seal(tmp_path / name)
        return lint(tmp_path / name)

    expert = changed("expert", lambda names: [*names, EXPERT])
    read = "model.layers.1.mixer.experts is FP8 on disk and would be read as BF16: the excluded modules match it"
    assert expert == [("vLLM", read)]
    query = changed("query", lambda names: [name for name in names if not name.endswith(("k_proj", "v_proj"))])
    assert [who for who, what in query if "stops with an error" in what] == ["vLLM", "SGLang"]
    folder = tmp_path / "older"
    shutil.copytree(ours / "fp8", folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["exclude_modules"] = content["quantization_config"].pop("ignore")
    (folder / "config.json").write_text(json.dumps(content))
    seal(folder)
    found = lint(folder)
    assert {who for who, _ in found} == {"vLLM before 0.33", "SGLang"}
    assert len(found) == 1 + 5  # lm_head, in_proj and out_proj of layer 2, qkv_proj and o_proj of layer 3
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    seal(folder)
    assert lint(folder) == []  # hf_quant_config.json is read then


def test_other_names_of_cache_scales(ours, tmp_path):
    shutil.copytree(ours / "fp8", tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    tensors[f"{CACHE}.kv_scale"] = tensors.pop(f"{CACHE}.k_proj.k_scale")
    del tensors[f"{CACHE}.v_proj.v_scale"]
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    seal(tmp_path / "fp8")
    assert lint(tmp_path / "fp8") == []


@pytest.mark.full
def test_the_command_line(tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "conversion/quantize_fp8.py", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)

    shown = call("nano", str(tmp_path / "none"), "--dry-run")
    assert shown.returncode == 0
    assert "5,968 of 6,004 matrices become FP8" in shown.stdout
    assert "63.16 GB become 32.66 GB" in shown.stdout
    refused = call("pico", str(tmp_path / "none"))
    assert refused.returncode == 2
    assert "give --calibration STORE" in refused.stderr
    tiny_store(tmp_path / "store", 40, longest=30, vocab_size=300, tokenizer=tokenizer_sha256(resolve_model("pico")))
    done = call("pico", str(tmp_path / "fp8"), "--calibration", str(tmp_path / "store"), "--samples", "8")
    assert done.returncode == 0, done.stderr
    assert lint(tmp_path / "fp8") == []
