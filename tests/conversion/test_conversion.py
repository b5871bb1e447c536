"""HF <-> NeMo: bit for bit there and back, as megatron-core itself wants it, refusals before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_nemo, nemo_to_hf
from conversion.checkpoint import pieces
from conversion.checkpoint.output_folder import CARD, CERTIFICATE
from conversion.checkpoint.plan import make_plan
from conversion.checkpoint.safetensors_layout import INDEX, OLD_EMBEDDING, FileLayout
from conversion.checkpoint.torch_dist import TorchDistReader
from nano3.arch import PRESETS, Arch
from nano3.cli import UserError
from nano3.sealed_folder import MARKER, SEAL, seal
from nano3.tensor_names import RowBlock, linears, megatron_tensors
from tests.helpers.rank_server import done_by, server
from tests.helpers.tiny import DENSE, TINY_CONFIG, tiny_hf_folder

ROOT = Path(__file__).parents[2]


def to_nemo(source: Path, out: Path) -> None:
    hf_to_nemo.convert(source, out, context=False)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, byte for byte, without our marker, certificate and card."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (CARD, CERTIFICATE, MARKER, SEAL)
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"torch_dtype": "float32"},
    "fp32 router": {"dtypes": {"gate.weight": "F32"}},
    "fp16 with bf16 D": {"torch_dtype": "float16", "dtypes": {".D": "BF16"}},
    "other counts": {"n_routed_experts": 3, "n_groups": 2, "num_key_value_heads": 1, "num_attention_heads": 6},
    "dense layers, odd vocabulary, shards": {"hybrid_override_pattern": "-M*E-M", "vocab_size": 133, "shards": 3},
    "dense, many groups": {**DENSE, "n_groups": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_bytes", [pieces.CHUNK_BYTES, 2000])
def test_round_trip_gives_every_file_back(
    variant: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Names, shapes, dtypes and values, config.json and tokenizer: all files equal, with chunks of 2,000 bytes too."""
    monkeypatch.setattr(pieces, "CHUNK_BYTES", chunk_bytes)
    source = tiny_hf_folder(tmp_path / "source", **VARIANTS[variant])
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("kept")
    to_nemo(source, tmp_path / "nemo")
    nemo_to_hf.convert(tmp_path / "nemo", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)


def test_weights_travel_under_another_layout(tmp_path: Path):
    """Without the record of the source's files the tensors are the same, in files of our own making."""
    source = tiny_hf_folder(tmp_path / "source", shards=3)
    to_nemo(source, tmp_path / "nemo")
    (tmp_path / "nemo" / "safetensors.json").unlink()
    seal(tmp_path / "nemo")
    nemo_to_hf.convert(tmp_path / "nemo", tmp_path / "back")
    expected = {k: v for path in sorted(source.glob("*.safetensors")) for k, v in load_file(path).items()}
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())


def test_layout_of_our_own_in_several_files():
    table = {"a": ("BF16", (3, 2)), "b": ("F32", (2,)), "c": ("BF16", (5,))}
    layout = FileLayout.make(table, shard_bytes=20)
    assert sorted(layout.sizes) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert layout.fits(table)
    assert json.loads(layout.index or b"")["weight_map"]["c"] == "model-00002-of-00002.safetensors"
    one = FileLayout.make(table)
    assert one.entries["b"].start % 4 == 0
    assert one.index is None
    assert FileLayout.from_json(layout.to_json().encode(), "x").headers == layout.headers


def test_qkv_rows_are_grouped():
    """Two KV heads, four query heads of 16: per group two query heads, one key head, one value head."""
    qkv = linears(Arch.from_config(TINY_CONFIG), 3)[0]
    name = "backbone.layers.3.mixer.{}_proj.weight"
    assert qkv.blocks == (
        RowBlock(name.format("q"), 0, 32),
        RowBlock(name.format("k"), 0, 16),
        RowBlock(name.format("v"), 0, 16),
        RowBlock(name.format("q"), 32, 32),
        RowBlock(name.format("k"), 16, 16),
        RowBlock(name.format("v"), 16, 16),
    )


def test_in_proj_sections_of_nano():
    nano = Arch.load(PRESETS["nano"])
    starts = {t.key[-2:]: t.blocks[0] for t in megatron_tensors(nano) if ".layers.0.mixer.in_proj.weight." in t.key}
    assert {key: (block.start, block.count) for key, block in starts.items()} == {
        ".z": (0, 4096),
        ".x": (4096, 4096),
        ".B": (8192, 1024),
        ".C": (9216, 1024),
        "dt": (10240, 64),
    }


@pytest.mark.parametrize("pattern", ["MEM*E", "-*ME"])
def test_every_row_of_every_tensor_is_used_once(pattern: str):
    arch = Arch.from_config(TINY_CONFIG | {"hybrid_override_pattern": pattern})
    rows: dict[str, list[int]] = {name: [0] * spec.shape[0] for name, spec in arch.tensors().items()}
    for tensor in megatron_tensors(arch):
        for block in tensor.blocks:
            for row in range(block.start, block.start + block.count):
                rows[block.name][row] += 1
    assert all(count == 1 for counts in rows.values() for count in counts)


def test_chunks_stay_small_and_cover_the_30b_model():
    nano = Arch.load(PRESETS["nano"])
    plan = make_plan(nano, {name: spec.dtype for name, spec in nano.tensors().items()})
    for tensor in plan.tensors:
        row = tensor.total_bytes // (tensor.shape[0] * (tensor.shape[1] if tensor.tensor.experts else 1))
        counts = [count for _, count in tensor.chunks()]
        assert max(counts) * row <= pieces.CHUNK_BYTES
        assert sum(counts) * row == tensor.total_bytes
    assert plan.total_bytes == 63_155_892_352


def test_vocabulary_padding_is_zeros_and_goes_away(tmp_path: Path):
    source = tiny_hf_folder(tmp_path / "source", vocab_size=133)
    to_nemo(source, tmp_path / "nemo")
    weight = TorchDistReader(tmp_path / "nemo" / "weights").whole("module.output_layer.weight")
    assert weight.shape == (256, 32)
    assert torch.equal(weight[:133], load_file(source / "model.safetensors")["lm_head.weight"])
    assert not weight[133:].any()


# ------------------------------------------------------------------ against megatron-core itself


def python(arguments: list[str]) -> str:
    """Runs Python in a fresh process on the CPU backend and returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NANO3_CPU": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_plan_is_what_the_stock_model_asks_for(tmp_path: Path):
    """Keys, global shapes and `_extra_state` objects equal those of megatron-core's own MambaModel, built on meta."""
    configs = [PRESETS["nano"]]
    configs += [PRESETS[name] for name in ("nano-4b", "nemotron-h-8b")]
    for number, overrides in enumerate([{"vocab_size": 133}, {"hybrid_override_pattern": "-ME*M-", "n_groups": 2}]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(json.dumps(TINY_CONFIG | overrides))
        configs.append(tmp_path / str(number))
    wanted = json.loads(done_by("tests.helpers.megatron_probe", "plan", *configs).splitlines()[-1])
    for config, model in zip(configs, wanted, strict=True):
        arch = Arch.load(config)
        plan = make_plan(arch, {name: spec.dtype for name, spec in arch.tensors().items()})
        assert {tensor.key: list(tensor.shape) for tensor in plan.tensors} == model["tensors"]
        assert sorted(plan.objects) == sorted(model["objects"])


def test_megatron_loads_it_on_two_ranks(tmp_path: Path):
    """TP=2 with EP=2: each rank's parameters are the slices that the layout defines, cut by hand from the HF tensors.

    The vocabulary of 100 is 128 rows in the checkpoint and 256 in the model: the surplus must be zeros.
    """
    source = tiny_hf_folder(tmp_path / "source", vocab_size=100, hybrid_override_pattern="ME*-")
    to_nemo(source, tmp_path / "nemo")
    arguments = ["load", str(tmp_path / "nemo"), "2", "2"]
    assert server().ranks("tests.helpers.megatron_probe", arguments, 2, tmp_path / "logs") == [0, 0]
    hf = load_file(source / "model.safetensors")
    ranks = [torch.load(tmp_path / "nemo" / f"rank{rank}.pt") for rank in range(2)]

    def check(name: str, *expected: torch.Tensor) -> None:
        for rank, tensor in zip(ranks, expected, strict=True):
            assert torch.equal(rank[name], tensor), name

    zeros = hf["lm_head.weight"].new_zeros
    check("output_layer.weight", torch.cat([hf["lm_head.weight"], zeros(28, 32)]), zeros(128, 32))
    in_proj = hf["backbone.layers.0.mixer.in_proj.weight"].split([64, 64, 64, 64, 8])
    check("decoder.layers.0.mixer.in_proj.weight", *(torch.cat([s.chunk(2)[r] for s in in_proj]) for r in (0, 1)))
    conv = hf["backbone.layers.0.mixer.conv1d.bias"].split([64, 64, 64])
    check("decoder.layers.0.mixer.conv1d.bias", *(torch.cat([s.chunk(2)[r] for s in conv]) for r in (0, 1)))
    check("decoder.layers.0.mixer.out_proj.weight", *hf["backbone.layers.0.mixer.out_proj.weight"].chunk(2, 1))
    for rank in (0, 1):
        for expert in range(4):
            loaded = ranks[rank][f"decoder.layers.1.mlp.experts.linear_fc2.weight{expert}"]
            assert torch.equal(loaded, hf[f"backbone.layers.1.mixer.experts.{4 * rank + expert}.down_proj.weight"])
    bias = hf["backbone.layers.1.mixer.gate.e_score_correction_bias"]
    check("decoder.layers.1.mlp.router.expert_bias", bias, bias)
    q, k, v = (hf[f"backbone.layers.2.mixer.{name}_proj.weight"].chunk(2) for name in "qkv")
    qkv = [torch.cat([q[rank], k[rank], v[rank]]) for rank in (0, 1)]
    check("decoder.layers.2.self_attention.linear_qkv.weight", *qkv)
    norm = hf["backbone.layers.3.norm.weight"]
    check("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", norm, norm)
    check("decoder.layers.3.mlp.linear_fc1.weight", *hf["backbone.layers.3.mixer.up_proj.weight"].chunk(2))


# ------------------------------------------------------------------ refusals


def resave(folder: Path, change: Any) -> None:
    """Rewrites model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)


def edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


NORM = "backbone.norm_f.weight"
BROKEN: dict[str, tuple[int, Any, str]] = {
    "truncated": (1, truncate, "truncated"),
    "header cut off": (1, lambda f: os.truncate(f / "model.safetensors", 20), "truncated"),
    "garbage": (1, lambda f: (f / "model.safetensors").write_bytes(b"\x05" + b"\0" * 7 + b"abcde"), "broken"),
    "no weights": (1, lambda f: (f / "model.safetensors").unlink(), r"lacks model\.safetensors"),
    "missing shard": (3, lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "lacks model-00002"),
    "no index": (3, lambda f: (f / INDEX).unlink(), r"lacks model\.safetensors"),
    "index not JSON": (3, lambda f: (f / INDEX).write_text("{}"), "weight_map is missing"),
    "stray shard": (
        3,
        lambda f: shutil.copy(f / "model-00001-of-00003.safetensors", f / "x.safetensors"),
        "x.safetensors",
    ),
    "index lacks a tensor": (3, lambda f: edit_index(f, lambda m: m.pop(NORM)), NORM),
    "index moves a tensor": (
        3,
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": m["backbone.embeddings.weight"]})),
        "lm_head.weight",
    ),
    "embedding as transformers 5.3": (
        1,
        lambda f: resave(f, lambda t: t.update({OLD_EMBEDDING: t.pop("backbone.embeddings.weight")})),
        "has backbone.embedding.weight, as transformers 5.3 named the embedding",
    ),
    "missing tensor": (1, lambda f: resave(f, lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "unknown tensor": (1, lambda f: resave(f, lambda t: t.update({"mtp.w": torch.zeros(2)})), r"holds mtp\.w"),
    "wrong shape": (1, lambda f: resave(f, lambda t: t.update({NORM: torch.zeros(31)})), f"{NORM} has shape"),
    "integer tensor": (1, lambda f: resave(f, lambda t: t.update({NORM: torch.zeros(32).int()})), f"{NORM}.*I32"),
    "other architecture": (1, lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type"),
    "experts of two dtypes": (
        1,
        lambda f: resave(
            f, lambda t: t.update({(n := "backbone.layers.1.mixer.experts.3.up_proj.weight"): t[n].float()})
        ),
        r"experts\.3\.up_proj\.weight is F32",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sources_are_refused_before_anything_is_written(case: str, tmp_path: Path):
    shards, damage, message = BROKEN[case]
    source = tiny_hf_folder(tmp_path / "source", shards=shards)
    damage(source)
    with pytest.raises(UserError, match=message):
        to_nemo(source, tmp_path / "nemo")
    assert os.listdir(tmp_path) == ["source"]


def test_broken_checkpoints_are_refused(tmp_path: Path):
    source = tiny_hf_folder(tmp_path / "source")
    nemo, out = tmp_path / "nemo", tmp_path / "out"
    to_nemo(source, nemo)
    with pytest.raises(UserError, match="not a folder"):
        nemo_to_hf.convert(tmp_path / "none", out)
    with pytest.raises(UserError, match="--hf"):
        nemo_to_hf.convert(source, out)
    other = tiny_hf_folder(tmp_path / "other", hybrid_override_pattern="MEM*")
    with pytest.raises(UserError, match=r"holds module\.decoder\.layers\.4"):
        nemo_to_hf.convert(nemo, out, hf=other)
    bigger = tiny_hf_folder(tmp_path / "bigger", vocab_size=129)
    with pytest.raises(UserError, match=r"word_embeddings\.weight has shape \(128, 32\)"):
        nemo_to_hf.convert(nemo, out, hf=bigger)
    file = next((nemo / "weights").glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match="truncated"):
        nemo_to_hf.convert(nemo, out)
    (nemo / "weights" / ".metadata").unlink()
    seal(nemo)
    with pytest.raises(UserError, match="not a Megatron torch_dist"):
        nemo_to_hf.convert(nemo, out)
    assert not out.exists()


def test_outputs_are_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tiny_hf_folder(tmp_path / "source")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a nemo-checkpoint"):
        to_nemo(source, tmp_path / "mine")
    for out in (source, source / "inside", tmp_path):
        with pytest.raises(UserError, match="overlap"):
            to_nemo(source, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="free; free some space"):
        to_nemo(source, tmp_path / "nemo")
    assert sorted(os.listdir(tmp_path)) == ["mine", "source"]
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_second_run_replaces_our_own_output(tmp_path: Path):
    to_nemo(tiny_hf_folder(tmp_path / "one", seed=1), tmp_path / "nemo")
    two = tiny_hf_folder(tmp_path / "two", seed=2)
    to_nemo(two, tmp_path / "nemo")
    nemo_to_hf.convert(tmp_path / "nemo", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(two)


def test_scripts_refuse_with_one_line_and_exit_code_2(tmp_path: Path):
    source = tiny_hf_folder(tmp_path / "source")
    truncate(source)
    command = [sys.executable, "conversion/hf_to_nemo.py", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "truncated" in done.stderr
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.full
def test_nemo_imports_restores_and_exports_with_the_same_code(tmp_path: Path):
    """llm.import_ckpt, AutoResume with RestoreConfig, io.load_context and llm.export_ckpt, in one fresh process."""
    source = tiny_hf_folder(tmp_path / "source", shards=2)
    nemo, back = tmp_path / "nemo", tmp_path / "back"
    python(["-m", "tests.helpers.nemo_io_probe", str(source), str(nemo), str(back)])
    assert tree(back) == tree(source)
    assert (nemo / "context" / "io.json").is_file()
