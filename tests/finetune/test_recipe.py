"""What the recipe's command line prints, derives and refuses; nothing here imports torch or NeMo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.settings import LoraSettings, Run, Settings
from launch.plan.layout import Layout
from nano3.sealed_folder import seal
from tests.helpers.tiny_store import tiny_store
from tests.launch.test_users_line import recipe

SCRIPT = "recipes/nemotron_lora.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def refused(*arguments: str) -> str:
    """The one line that a refused call prints; no traceback, exit code 2."""
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.usefixtures("roomy_disk")
def test_dry_run_of_two_nodes_is_the_published_recipe_in_numbers(monkeypatch, capsys):
    code = recipe(monkeypatch, "--nodes", "2", "--dry-run")
    said = capsys.readouterr()
    assert code == 0, said.err
    # Rank 32 on every linear layer, one adapter for all routed experts of a layer: 33.4M as Megatron-Bridge counts.
    assert "33,368,064 parameters" in said.out
    assert "31,577,937,344 parameters, 3,580,073,408 active" in said.out
    assert "layout.ep=8" in said.out
    assert "16 of 128 experts per rank" in said.out


def test_trainable_parameters_by_hand():
    from finetune.command import trainable_parameters
    from nano3.arch import Arch, resolve_model

    settings = Settings(lora=LoraSettings(preset="attention", rank=2))
    run = Run("", "", "", None, "", 1, 1, True, settings)
    # Six layers of linear_qkv 2688 -> 4096 + 2 * 256 and linear_proj 4096 -> 2688.
    assert trainable_parameters(run, Arch.load(resolve_model("nano"))) == 6 * 2 * (2688 + 4608 + 4096 + 2688)


def test_a_run_survives_its_json():
    run = Run("m", "b", "d", None, "o", 2, 8, False, Settings(layout=Layout(tp=2), lora=LoraSettings(targets=["x"])))
    assert Run.from_json(run.to_json()) == run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "2"], ["--nodes 2", "cluster", "--dry-run"]),
        (["--model", "nowhere"], ["nowhere", "preset"]),
        (["lora.rnk=4"], ["lora.rnk", "lora.rank"]),
        (["lora.rank=many"], ["lora.rank", "many", "whole number"]),
        (["lora.targets=linear_kqv"], ["linear_kqv", "linear_qkv"]),
        (["lora.preset=some"], ["lora.preset", "some", "attention"]),
        (["layout.tp=3"], ["layout.tp", "3"]),
        (["layout.pp=64"], ["52", "layout.pp"]),
        (["layout.cp=3", "train.seq_length=4096"], ["layout.cp", "nearest valid on 8 ranks"]),
        (["lora.rank=3", "layout.tp=2"], ["lora.rank", "rank 3", "layout.tp=2"]),
        (["train.warmup=300", "train.steps=300"], ["train.warmup=300", "train.steps=300"]),
        (["train.min_lr=1"], ["train.min_lr=1.0", "train.lr=0.0001"]),
        (["lora.alpha=0"], ["lora.alpha", "change nothing"]),
        (["train.beta2=1"], ["train.beta2=1.0"]),
        (["train.validate_every=5"], ["train.validate_every=5", "--validation"]),
        (["train.patience=2"], ["train.patience=2", "train.validate_every"]),
        (["train.micro_batch=4"], ["unknown key train.micro_batch", "train.global_batch"]),
        (["--eval-only"], ["--eval-only", "--validation"]),
        (["--adapter", "x"], ["--adapter", "--eval-only"]),
        (["--ranks", "2"], ["--ranks", "--local"]),
        (["--after", "12", "--local"], ["--after", "--cluster"]),
        (["--local", "--gpus-per-node", "2"], ["--local", "--gpus-per-node"]),
        (["train.lr=0"], ["train.lr"]),
        (["lora.dropout=1"], ["lora.dropout"]),
        (["--local", "--ranks", "3", "layout.ep=2"], ["3"]),
        (["--local", "--nodes", "2"], ["--local", "--ranks"]),
        (["router=free"], ["router", "frozen", "balance"]),
        (["router=balance", "--model", "nano-4b"], ["router=balance", "no router"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_with_the_thing_and_the_remedy(arguments, words):
    line = refused(*arguments)
    assert all(word in line for word in words), line


def local(tmp_path: Path, *arguments: str) -> list[str]:
    common = [
        "--model",
        "pico",
        "--local",
        "--out",
        str(tmp_path / "out"),
        "train.seq_length=64",
        "train.global_batch=2",
    ]
    return [*common, *arguments]


def test_data_that_cannot_be_used_is_refused_and_nothing_is_written(tmp_path):
    tiny_store(tmp_path / "store", documents=5, longest=9, vocab_size=100)
    (tmp_path / "empty").mkdir()
    for arguments, word in (
        ([], "--data"),
        (["--data", str(tmp_path / "absent")], "absent"),
        (["--data", str(tmp_path / "empty")], "empty"),
        (["--data", str(tmp_path / "store")], "data_prep/repack.py"),  # no packs of this length
    ):
        assert word in refused(*local(tmp_path, *arguments))
    assert not (tmp_path / "out").exists()


def test_a_source_inside_the_output_is_refused(tmp_path):
    tiny_store(tmp_path / "out" / "store", documents=5, longest=9, vocab_size=100)
    assert "overlap" in refused(*local(tmp_path, "--data", str(tmp_path / "out" / "store")))
    assert (tmp_path / "out" / "store" / "tokens.bin").exists()


def test_a_balanced_router_is_announced():
    assert "correction biases MOVE" in run("router=balance", "--dry-run").stdout
    assert "MOVE" not in run("--dry-run").stdout


def pico_store(path: Path, documents: int) -> Path:
    """A store of pico's tokenizer with packs of 64."""
    from data_prep.packing import build_packs
    from nano3.arch import resolve_model
    from nano3.token_store import TokenStore, tokenizer_sha256

    tiny_store(path, documents, longest=30, vocab_size=300, tokenizer=tokenizer_sha256(resolve_model("pico")))
    build_packs(TokenStore(path), 64)
    return path


def test_ranks_that_end_early_with_code_0_are_no_success(tmp_path, monkeypatch, capsys):
    from finetune import command as nemotron_lora

    pico_store(tmp_path / "store", 50)
    flags = local(tmp_path, "--data", str(tmp_path / "store"))
    run, arch = nemotron_lora.resolve(nemotron_lora.parser().parse_intermixed_args(flags))
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "lora.json").write_text("of the last run")
    (tmp_path / "out" / "nano3.json").write_text(json.dumps({"kind": "lora-run"}))
    monkeypatch.setattr("launch.local.run_ranks", lambda *_: 0)
    monkeypatch.setattr("conversion.hf_to_nemo.convert", lambda *_, **__: 0)
    assert nemotron_lora.train(run, arch, overwrite=True) == 1
    assert "wrote no adapter" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter.previous" / "lora.json").read_text() == "of the last run"


def test_a_nemo_checkpoint_is_a_model(tmp_path):
    from conversion.hf_to_nemo import convert
    from tests.helpers.tiny import tiny_hf_folder

    convert(tiny_hf_folder(tmp_path / "hf"), tmp_path / "nemo", context=False)
    done = run("--model", str(tmp_path / "nemo"), "--local", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "nemo" / "hf") in done.stdout


def test_a_base_that_was_imported_before_is_taken_and_another_refused(tmp_path):
    data = tiny_store(tmp_path / "store", 20, 30, 128)
    run = ("--model", "pico", "--local", "--data", str(data), "--base", str(tmp_path / "base"))
    (tmp_path / "base" / "hf").mkdir(parents=True)
    assert "is no NeMo checkpoint: make it with conversion/hf_to_nemo.py" in refused(*run)
    (tmp_path / "base" / "weights").mkdir()
    config = json.loads(Path("nano3/presets/pico/config.json").read_text())
    (tmp_path / "base" / "hf" / "config.json").write_text(json.dumps(config | {"n_groups": 2}))
    assert "is of another architecture" in refused(*run)
    (tmp_path / "base" / "hf" / "config.json").write_text(json.dumps(config))
    assert "files.json, which says what the folder holds, is missing" in refused(*run)
    seal(tmp_path / "base")
    assert "has no packs" in refused(*run)  # the base is fine
    assert "is a NeMo checkpoint itself" in refused("--model", str(tmp_path / "base"), *run[2:])


def test_the_targets_are_the_linear_layers_of_the_name_map():
    from nano3.arch import Arch, resolve_model
    from nano3.targets import VOCABULARY, adaptable_modules
    from nano3.tensor_names import linears

    arch = Arch.load(resolve_model("nano"))
    mapped = {f"decoder.layers.{n}.{linear.module}" for n in range(len(arch.layers)) for linear in linears(arch, n)}
    assert set(adaptable_modules(arch)) == mapped | set(VOCABULARY)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "not a lora-run" in refused(*local(tmp_path))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_not_lost_to_a_second_one(tmp_path):
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "nano3.json").write_text(json.dumps({"kind": "lora-run"}))
    assert "--overwrite" in refused(*local(tmp_path))
