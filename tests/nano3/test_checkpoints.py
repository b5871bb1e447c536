"""Checkpoint folders without training: which is newest, what is refused, what is removed; replicas and full disks."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.tensor_digests import content_hash, facts_of
from conversion.hf_to_nemo import convert
from conversion.identity import holds
from data_prep.packing import build_packs
from finetune.run_identity import run_identity, run_layout
from finetune.run_local import train
from finetune.settings import CheckpointSettings, LogSettings, Run, Settings, TrainSettings
from launch.plan.layout import Layout
from launch.plan.plan_settings import Plan, TrainPlan
from launch.plan.rules import check_cut
from nano3.arch import PRESETS, Arch
from nano3.checkpoints.base_identity import recorded_sha256
from nano3.checkpoints.checkpoint_folder import (
    FORMAT,
    checkpoints,
    clear_unfinished,
    disk_full,
    layout_in_words,
    newest,
    prune,
    refuse_other_run,
    step_folder,
    step_of,
)
from nano3.checkpoints.replicas import disagreements
from nano3.cli import UserError
from nano3.file_system import locked
from nano3.outputs import fresh_output
from nano3.sealed_folder import seal
from nano3.token_store import TokenStore
from tests.helpers.damage import change_keeping_size_and_time
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_store import tiny_store


def checkpoint(out: Path, step: int, **identity: object) -> Path:
    """A folder with the files of a checkpoint, by their names."""
    folder = step_folder(out, step)
    (folder / "training").mkdir(parents=True)
    (folder / "lora.json").write_text("{}")
    (folder / "training" / "ranks.pt").write_bytes(bytes(100))
    state = {"format": FORMAT, "step": step, "samples": step, "layout": {"ranks": 2}, "identity": identity}
    (folder / "training" / "state.json").write_text(json.dumps(state))
    seal(folder)
    return folder


def test_the_newest_by_number_not_by_name(tmp_path):
    assert newest(tmp_path) is None
    for step in (999_999, 1_000_000, 20):
        checkpoint(tmp_path, step)
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [20, 999_999, 1_000_000]
    assert newest(tmp_path) == step_folder(tmp_path, 1_000_000)


def test_what_a_kill_leaves_is_neither_read_nor_kept(tmp_path):
    checkpoint(tmp_path, 2)
    for left in (".step-000004.partial-1-0123abcd", ".step-000004.removed", ".step-notes"):
        (tmp_path / "checkpoints" / left / "weights").mkdir(parents=True)
    (tmp_path / "checkpoints/.step-000004.lock").touch()
    with fresh_output(tmp_path / ".best.old-1-0123abcd", "lora-adapter"):
        pass  # killed between two renames
    assert newest(tmp_path) == step_folder(tmp_path, 2)
    with locked(tmp_path / ".best.lock") as mine:  # as a server of files may hold it for a node that is gone
        assert mine
        clear_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [".step-notes", "step-000002"]
    assert sorted(os.listdir(tmp_path)) == ["best", "checkpoints"]


def test_pruning_keeps_the_newest(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step)
    prune(tmp_path, keep=2)
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [6, 8]
    prune(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000008"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "unlisted"])
def test_a_damaged_newest_checkpoint_is_refused_and_the_way_out_named(tmp_path, damage):
    checkpoint(tmp_path, 2)
    folder = checkpoint(tmp_path, 4)
    if damage == "truncated":
        (folder / "training" / "ranks.pt").write_bytes(bytes(99))
        words = "ranks.pt has 99 bytes and should have 100"
    elif damage == "missing":
        (folder / "training" / "ranks.pt").unlink()
        words = "ranks.pt is missing"
    else:
        (folder / "files.json").unlink()
        words = "files.json, which says what the folder holds, is missing"
    with pytest.raises(UserError) as refused:
        newest(tmp_path)
    assert words in str(refused.value)
    assert f"remove the folder {folder} to resume from step 2" in str(refused.value)


def test_a_copy_under_a_higher_step_is_refused(tmp_path):
    """It is whole and of this run, and steps 3 to 6 were never taken."""
    shutil.copytree(checkpoint(tmp_path, 2), step_folder(tmp_path, 6))
    with pytest.raises(UserError, match=r"step-000006 was written after step 2: it is a copy, or was renamed"):
        newest(tmp_path)


def test_another_run_is_refused_by_what_differs(tmp_path):
    folder = checkpoint(tmp_path, 2, **{"base": "abc", "lora.rank": 8})
    refuse_other_run(folder, {"base": "abc", "lora.rank": 8})
    with pytest.raises(UserError, match=r"lora\.rank was 8 and is 16.*another --out.*--overwrite"):
        refuse_other_run(folder, {"base": "abc", "lora.rank": 16})
    with pytest.raises(UserError, match=r"train\.new was None and is 1"):
        refuse_other_run(folder, {"base": "abc", "lora.rank": 8, "train.new": 1})


def test_a_checkpoint_of_an_older_format_is_refused(tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / "training" / "state.json").write_text('{"step": 2, "samples": 2, "identity": {}}')
    with pytest.raises(UserError, match=r"of format 1 and this code reads 2.*version of this repository"):
        refuse_other_run(folder, {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Hugging Face model in one file and in three, its import, and a store."""
    folder = tmp_path_factory.mktemp("base")
    tiny_hf_folder(folder / "hf")
    tiny_hf_folder(folder / "shards", shards=3)
    convert(folder / "hf", folder / "nemo", context=False)
    tiny_store(folder / "store", documents=60, longest=30, vocab_size=128)
    build_packs(TokenStore(folder / "store"), 64)
    return folder


def sha256(folder: Path) -> str:
    with HFFolder(folder) as hf:
        return content_hash(facts_of(hf))


def test_the_content_hash_by_hand_and_whatever_the_files(base, tmp_path):
    from safetensors import safe_open

    lines = []
    with safe_open(base / "hf" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            tensor = file.get_tensor(name)
            digest = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            dtype = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
            lines.append(f"{name} {dtype} {tuple(tensor.shape)} {digest}")
    expected = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert sha256(base / "hf") == sha256(base / "shards") == recorded_sha256(base / "nemo") == expected
    assert sha256(tiny_hf_folder(tmp_path / "other", seed=1)) != expected


def test_an_import_is_used_again_only_while_its_source_is_the_same(base, tmp_path, capsys):
    source = tiny_hf_folder(tmp_path / "hf")
    convert(source, tmp_path / "nemo", context=False)
    assert holds(tmp_path / "nemo", source)
    assert holds(tmp_path / "nemo", base / "hf")  # the same model elsewhere
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    assert not holds(tmp_path / "nemo", source)
    shutil.copy(base / "hf/config.json", source)
    assert holds(tmp_path / "nemo", source)
    change_keeping_size_and_time(source / "model.safetensors")
    assert not holds(tmp_path / "nemo", source)
    change_keeping_size_and_time(tmp_path / "nemo/weights/__0_0.distcp")
    assert not holds(tmp_path / "nemo", base / "hf")
    assert "__0_0.distcp is not what was written" in capsys.readouterr().err
    (tmp_path / "nemo" / "base.json").unlink()
    with pytest.raises(UserError, match=r"does not say which base.*hf_to_nemo\.py"):
        recorded_sha256(tmp_path / "nemo")


def task(base: Path, out: Path, **train_settings: object) -> Run:
    settings = Settings(train=TrainSettings(**{"seq_length": 64, "steps": 300, **train_settings}))  # type: ignore[arg-type]
    return Run(str(base / "hf"), str(base / "nemo"), str(base / "store"), None, str(out), 1, 2, True, settings)


def test_paths_logs_and_cadence_may_change_and_nothing_that_has_a_say(base, tmp_path):
    before = run_identity(task(base, tmp_path / "a").to_json())
    moved = task(base, tmp_path / "b")
    moved.settings.checkpoint, moved.settings.log = CheckpointSettings(every=1), LogSettings(every=1)
    assert run_identity(moved.to_json()) == before
    other = run_identity(task(base, tmp_path / "a", steps=301).to_json())
    assert {name for name in before if before[name] != other[name]} == {"train.steps"}
    tiny_store(tmp_path / "store", documents=60, longest=30, vocab_size=128, seed=1)
    build_packs(TokenStore(tmp_path / "store"), 64)
    elsewhere = task(base, tmp_path / "a")
    elsewhere.data = str(tmp_path / "store")
    assert {name for name, value in run_identity(elsewhere.to_json()).items() if before[name] != value} == {"data"}


def test_ranks_and_layout_may_change_and_packs_may_not(base, tmp_path):
    """Context parallelism wants documents in pieces: a run that is to go on under it says so from the start."""
    before = run_identity(task(base, tmp_path / "a").to_json())
    moved = task(base, tmp_path / "a")
    moved.ranks_per_node, moved.settings.layout = 4, Layout(tp=2, ep=4)
    assert run_identity(moved.to_json()) == before
    assert layout_in_words(run_layout(moved)) == "4 ranks (tp=2 ep=4)"
    assert layout_in_words(run_layout(task(base, tmp_path / "a"))) == "2 ranks"
    build_packs(TokenStore(base / "store"), 64, pad_multiple=4)
    moved.settings.layout = Layout(cp=2)
    cut = run_identity(moved.to_json())
    assert {name for name in before if before[name] != cut[name]} == {"train.pad_multiple", "data"}
    assert (before["train.pad_multiple"], cut["train.pad_multiple"]) == (1, 4)
    assert run_identity(task(base, tmp_path / "a", pad_multiple=4).to_json()) == cut


@pytest.mark.parametrize(
    ("layout", "multiple", "words"),
    [
        (Layout(cp=2), 2, r"train\.pad_multiple=2 must be a multiple of 4, which layout\.cp=2 needs, or 0"),
        (Layout(), -1, r"train\.pad_multiple=-1 must be a multiple of 1"),
        (Layout(), 6, r"train\.seq_length=64 must be a multiple of train\.pad_multiple=6"),
    ],
)
def test_packs_that_a_layout_cannot_cut_are_refused(layout, multiple, words):
    arch = Arch.load(PRESETS["pico"])
    check_cut(arch, Plan(train=TrainPlan(seq_length=64, pad_multiple=4)), {}, Layout(cp=2))
    with pytest.raises(UserError, match=words):
        check_cut(arch, Plan(train=TrainPlan(seq_length=64, pad_multiple=multiple)), {}, layout)


def test_a_launcher_refuses_before_it_starts_a_rank(base, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.local.run_ranks", lambda *_: pytest.fail("a rank was started"))
    run = task(base, tmp_path / "out")
    (tmp_path / "out").mkdir()
    folder = checkpoint(tmp_path / "out", 2, **(run_identity(run.to_json()) | {"train.lr": 1.0}))
    (tmp_path / "out" / "nano3.json").write_text(json.dumps({"kind": "lora-run"}))
    with pytest.raises(UserError, match=r"train\.lr was 1\.0 and is 0\.0001"):
        train(run)
    (folder / "training" / "ranks.pt").unlink()
    with pytest.raises(UserError, match=r"ranks\.pt is missing"):
        train(run)


def test_two_runs_in_one_folder_are_refused(base, tmp_path, monkeypatch):
    run = task(base, tmp_path / "out")

    def second(*_: object) -> int:
        with pytest.raises(UserError, match="another run is writing"):
            train(run)
        return 1

    monkeypatch.setattr("launch.local.run_ranks", second)
    assert train(run) == 1


def test_how_to_go_on_is_said(base, tmp_path, monkeypatch, capsys):
    run = task(base, tmp_path / "out")
    monkeypatch.setattr("launch.local.run_ranks", lambda *_: 1)
    assert train(run) == 1
    assert "no checkpoint: the same command starts from the beginning" in capsys.readouterr().err
    checkpoint(tmp_path / "out", 4, **run_identity(run.to_json()))
    run.ranks_per_node, run.settings.layout = 4, Layout(ep=4)
    assert train(run) == 1
    said = capsys.readouterr().err
    assert "resuming after step 4" in said
    assert "the same command resumes after step 4" in said
    assert train(run, overwrite=True) == 1
    assert "resuming" not in capsys.readouterr().err
    assert checkpoints(tmp_path / "out") == []


def test_replicas_that_differ_are_named_with_their_ranks():
    place = ("layers.0.linear_in.weight", (0, 0), (4, 8))
    other = ("layers.0.linear_in.weight", (4, 0), (4, 8))  # another part of the tensor: may differ
    held = [{place: "a"}, {place: "a", other: "c"}, {place: "b", other: "c"}]
    assert disagreements(held) == ["layers.0.linear_in.weight (ranks alike: 0, 1 | 2)"]
    assert disagreements([{place: "a"}, {place: "a"}, {other: "b"}]) == []


def test_a_disk_too_small_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1234))
    message = str(disk_full(tmp_path / "checkpoints" / "step-000002", 5_000_000))
    assert "step-000002 could not be written; 5,000,000 bytes are needed and 1,234 bytes are free in" in message
    assert "checkpoint.keep" in message
