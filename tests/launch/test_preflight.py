"""Preflight: verdicts on a table of layouts, exit codes, and what it finds on disk."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from data_prep.packing import PackedDataset, build_packs
from data_prep.prepare import Options, prepare
from finetune.settings import Settings
from launch import preflight
from launch.plan import preflight_checks
from launch.plan.hardware import HARDWARE
from launch.plan.mounts import parse_mount
from launch.plan.plan_settings import Plan
from launch.plan.preflight_checks import (
    Paths,
    check_model,
    check_mounts,
    check_output,
    check_overlap,
    check_store,
    check_validation,
    disk_bytes,
)
from launch.plan.recommend import row as recommend_row
from launch.plan.search import recommend
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.helpers.data_fixtures import row, write_jsonl
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_store import tiny_store

ROOT = Path(__file__).parents[2]
NANO = Arch.load(resolve_model("nano"))
TABLE = [
    [part.strip() for part in line.split("|")]
    for line in (ROOT / "tests" / "helpers" / "preflight_verdicts.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def asked(*arguments: str) -> preflight.Request:
    return preflight.read_request(preflight.parser().parse_intermixed_args(list(arguments)))


def test_the_table_is_long_enough_and_every_row_has_a_reason():
    assert len(TABLE) >= 40
    assert f"holds {len(TABLE)} layouts" in (ROOT / "docs" / "memory.md").read_text()
    assert all(len(row) == 5 and row[4] for row in TABLE)


@pytest.mark.parametrize(
    ("hardware", "nodes", "settings", "verdict", "_why"), TABLE, ids=[" ".join(r[:3]) for r in TABLE]
)
def test_verdict(hardware, nodes, settings, verdict, _why):
    code, text = preflight.report(asked("--hardware", hardware, "--nodes", nodes, *settings.split()), files=False)
    starts = {"fits": "fits: ", "no": "DOES NOT FIT: ", "wrong": "CANNOT BE RIGHT: "}[verdict]
    assert text.startswith(starts), text
    assert code == (0 if verdict == "fits" else 1)


def script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "preflight.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_how_long_a_run_is_and_what_it_costs():
    """206 steps of 16 packs of 4,096 tokens; a GPU-hour is 3,600 seconds of one of the 16 GPUs."""
    settings = ["train.steps=206", "train.global_batch=16", "train.seq_length=4096"]
    request = asked("--hardware", "h100", "--nodes", "2", *settings)
    _, text = preflight.report(request, files=False)
    assert 206 * 16 * 4096 == 13_500_416
    per_second = float(re.search(r"estimate: ([\d,]+) tokens/s/GPU", text)[1].replace(",", ""))
    hours = 13_500_416 / per_second / 3600
    minutes = hours * 60 / 16
    assert f"206 steps take {minutes:.0f} minutes: 13.5M tokens at most, {hours:.1f} GPU-hours. " in text


def test_exit_codes_and_the_time_that_it_takes():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = script("--hardware", "h100", "--nodes", "2", "--seq", "8192", "--rules-only")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    assert script("--hardware", "h100", "--rules-only", "layout.ep=3").returncode == 1
    for wrong in (
        ("--hardware", "a100"),
        ("--hardware", "h100", "layout.zp=2"),
        ("--hardware", "h100", "--nodes", "0"),
        ("--hardware", "h100", "--gpus-per-node", "9"),
        ("--hardware", "h100", "--mount", "/data"),
        ("--hardware", "h100", "--model", "/nowhere"),
        ("--hardware", "h100", "lora.targets=nothing"),
        ("--hardware", "h100", "lora.rank_pattern=in_proj:abc"),
        ("--hardware", "h100", "--search", "lora.rank=0"),
        ("--nodes", "2"),
    ):
        done = script(*wrong)
        assert done.returncode == 2, done
        assert not done.stdout
        assert "Traceback" not in done.stderr


def test_launch_loads_neither_torch_nor_nemo():
    modules = "launch.preflight, launch.plan.recommend, launch.slurm.sbatch"
    code = f"import sys, {modules}; print(sorted({{'torch', 'nemo', 'megatron'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_settings_have_the_recipes_names_and_defaults():
    plan, recipe = Plan(), Settings()
    for group in ("layout", "lora", "train", "checkpoint"):
        mine, theirs = getattr(plan, group), getattr(recipe, group)
        assert isinstance(theirs, type(mine))
        for field in fields(mine):
            assert getattr(theirs, field.name) == getattr(mine, field.name), field.name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpus-per-node", "3"],
        ["train.seq_length=0"],
        ["train.global_batch=100", "layout.cp=2", "train.seq_length=4098"],
        ["layout.ep=3"],
    ],
    ids=" ".join,
)
def test_what_is_said_to_fit_fits_as_it_is_printed(arguments):
    code, text = preflight.report(asked("--hardware", "h200", *arguments), files=False)
    assert code == 1
    rows = text.split("these fit:")[1].splitlines()[1:]
    assert rows
    for line in rows:
        changed = dict(word.split("=") for word in [*arguments, *line.split()] if "=" in word)  # the row's own win
        flags = arguments[:2] if arguments[0].startswith("--") else []
        settings = [f"{key}={value}" for key, value in changed.items()]
        again, said = preflight.report(asked("--hardware", "h200", *flags, *settings), files=False)
        assert again == 0, (line, said)


def test_what_does_not_fit_is_told_what_does():
    code, text = preflight.report(asked("--hardware", "h100", "--seq", "32768"), files=False)
    assert code == 1
    nearest = text.split("nearest that fit:")[1].splitlines()[1:4]
    for line in nearest:
        settings = [word for word in line.split() if "=" in word]
        again = preflight.report(asked("--hardware", "h100", "--seq", "32768", *settings), files=False)
        assert again[0] == 0, settings
    code, text = preflight.report(asked("--hardware", "h100", "--gpus-per-node", "1", "--seq", "1048576"), files=False)
    assert code == 1
    assert "no layout fits on these ranks" in text


def test_search_ranks_layouts_that_fit():
    code, text = preflight.search(asked("--hardware", "h100", "--nodes", "2", "--seq", "8192"))
    lines = text.splitlines()
    assert code == 0
    assert lines[1].split()[0] == "layout.ep=8"
    speeds = [float(line.split()[-2].replace(",", "")) for line in lines[2:-1]]
    assert speeds == sorted(speeds, reverse=True)
    assert preflight.search(asked("--hardware", "h100", "--gpus-per-node", "1", "--seq", "1048576"))[0] == 1


def test_the_layout_to_start_with_is_tensor_parallel_1_with_experts_in_the_nvlink_domain():
    for name in ("h100", "h200"):
        for nodes in (1, 2):
            best = recommend(NANO, HARDWARE[name], nodes, 4096)
            assert best is not None
            assert (best.plan.layout.tp, best.plan.layout.ep, best.plan.train.recompute) == (1, 8, [])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Paths:
    """A model, a store with packs of 32 tokens, and a place for the output."""
    folder = tmp_path_factory.mktemp("preflight")
    model = tiny_hf_folder(folder / "hf")
    data = tiny_store(folder / "store", 40, 60, 128, tokenizer=tokenizer_sha256(model))
    build_packs(TokenStore(data), 64)
    return Paths(model, data, out=folder / "out")


def wrong(findings) -> list[str]:
    return [finding.text for finding in findings if finding.wrong]


def plan_of(seq_length: int, **changes) -> Plan:
    plan = Plan(**changes)
    plan.train.seq_length = seq_length
    return plan


def test_a_store_is_checked_for_packs_and_tokenizer(world, tmp_path):
    arch = Arch.load(world.model)
    found, packs = check_store(plan_of(64), arch, world)
    assert not wrong(found)
    assert packs
    missing, packs = check_store(plan_of(48), arch, world)
    assert packs is None
    assert "has no packs-48 (it has packs-64)" in wrong(missing)[0]
    assert f"repack.py {world.data} --seq-length 48" in wrong(missing)[0]
    cut = plan_of(64)
    cut.layout.cp = 2
    assert "has no packs-64-pad4" in wrong(check_store(cut, arch, world)[0])[0]
    other = shutil.copytree(world.model, tmp_path / "other")
    written = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(written, indent=5))  # written again: still the same
    assert not wrong(check_store(plan_of(64), arch, Paths(other, world.data))[0])
    vocabulary = written["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(written))
    assert "another tokenizer" in wrong(check_store(plan_of(64), arch, Paths(other, world.data))[0])[0]
    assert "is not a token store" in wrong(check_store(plan_of(64), arch, Paths(world.model, tmp_path))[0])[0]


def test_a_store_for_evaluation_only_is_no_training_data(tmp_path):
    """What the run refuses, preflight says before the queue; to validate on it is what it is for."""
    pico = resolve_model("pico")
    file = write_jsonl(tmp_path / "rows.jsonl", [row("a", "b") | {"evaluation_only": True}])
    store = prepare([file], pico, tmp_path / "store", 64, Options(evaluation_data=True))[0].folder
    paths = Paths(pico, store, validation=store)
    assert "holds rows for evaluation only" in wrong(check_store(plan_of(64), Arch.load(pico), paths)[0])[0]
    assert not wrong(check_validation(plan_of(64), Arch.load(pico), paths))


def test_a_validation_store_is_checked_like_the_other(world, tmp_path):
    arch = Arch.load(world.model)
    (note,) = check_validation(plan_of(64), arch, replace(world, validation=world.data))
    assert (note.wrong, note.text.split()[1:5]) == (False, ["packs", "to", "validate", "on,"])
    for store, words in ((world.data, "has no packs-48"), (tmp_path, "is not a token store")):
        problems = wrong(check_validation(plan_of(48), arch, replace(world, validation=store)))
        assert problems[0].startswith("--validation: ")
        assert words in problems[0]
    assert not check_validation(plan_of(64), arch, world)
    arguments = ["--hardware", "h100", "--gpus-per-node", "1", "--model", str(world.model), "--data", str(world.data)]
    code, text = preflight.report(asked(*arguments, "--validation", str(tmp_path), "train.seq_length=64"), files=True)
    assert code == 1
    assert "WRONG: --validation: " in text


def test_validation_questions_that_are_trained_on_are_found(tmp_path):
    """40 of 100 are planted, with other answers; the store of the 60 others passes."""
    pico = resolve_model("pico")
    rows = [row(f"Sort these numbers: {number}, 7, 3", "3, 7") for number in range(160)]
    planted = [row(f"Sort these numbers: {number}, 7, 3", "7") for number in range(40)]
    sets = {"train": rows[:60], "clean": rows[100:160], "held": [*rows[100:160], *planted]}
    stores = {
        name: prepare([write_jsonl(tmp_path / f"{name}.jsonl", part)], pico, tmp_path / name, 64)[0].folder
        for name, part in sets.items()
    }
    assert not check_overlap(Paths(pico, stores["train"], validation=stores["clean"]))
    (found,) = check_overlap(Paths(pico, stores["train"], validation=stores["held"]))
    assert found.wrong
    assert found.text.startswith("40 of 100 validation documents have a prompt that is trained on (the first is ")
    assert "held.jsonl:61" in found.text
    request = ["--hardware", "h100", "--gpus-per-node", "1", "--model", "pico", "--data", str(stores["train"])]
    code, text = preflight.report(asked(*request, "--validation", str(stores["held"]), "--seq", "64"), files=True)
    assert (code, "WRONG: 40 of 100 validation documents" in text) == (1, True)


@pytest.mark.parametrize("broken", ["documents.bin", "packs.idx", "packs.json", "manifest.json"])
def test_a_pack_index_that_the_run_refuses_is_found_before(world, tmp_path, broken):
    arch, data = Arch.load(world.model), Path(shutil.copytree(world.data, tmp_path / "store"))
    assert not wrong(check_store(plan_of(64), arch, Paths(world.model, data))[0])
    if broken == "manifest.json":  # the same data, prepared again in another way: the packs are of the old one
        (data / broken).write_text((data / broken).read_text() + "\n")
    else:
        file = data / "packs-64" / broken
        file.write_bytes(file.read_bytes()[:-8])
    found, packs = check_store(plan_of(64), arch, Paths(world.model, data))
    with pytest.raises(UserError) as refused:
        PackedDataset(data, 64)
    assert (wrong(found), packs) == ([str(refused.value)], None)


def test_a_truncated_or_missing_checkpoint_is_found(world, tmp_path):
    assert not wrong(check_model(world))
    copy = shutil.copytree(world.model, tmp_path / "hf")
    file = next(copy.glob("*.safetensors"))
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    assert "should have" in wrong(check_model(Paths(copy)))[0]
    file.write_bytes(b"")
    assert "is truncated or no safetensors file" in wrong(check_model(Paths(copy)))[0]
    file.unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file.name}}))
    assert "is missing" in wrong(check_model(Paths(copy)))[0]
    nemo = tmp_path / "nemo"
    (nemo / "weights").mkdir(parents=True)
    (nemo / "hf").mkdir()
    assert "NeMo checkpoint without" in wrong(check_model(Paths(nemo)))[0]


def test_the_output_needs_room_and_a_place_of_its_own(world, tmp_path, monkeypatch):
    roomy = shutil._ntuple_diskusage(2**40, 0, 2**40)  # type: ignore[attr-defined]  # whatever this machine has
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: roomy)
    assert not wrong(check_output(Plan(), NANO, Paths(world.model, out=tmp_path / "new"), 1)[:1])
    (tmp_path / "notes.txt").write_text("mine")
    assert "are no run of this project" in wrong(check_output(Plan(), NANO, Paths(world.model, out=tmp_path), 1))[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1))
    full = wrong(check_output(Plan(), NANO, Paths(world.model, out=tmp_path / "new"), 1))
    elsewhere = wrong(check_output(Plan(), NANO, Paths(world.model, out=tmp_path / "new", imported=True), 1))
    seeds = wrong(check_output(Plan(), NANO, Paths(world.model, out=tmp_path / "new", runs=3), 1))
    assert "about 60.6 GiB and" in full[0]
    assert "about 181.7 GiB for 3 runs and" in seeds[0]
    assert "about 1.7 GiB" in elsewhere[0]  # adapters and their optimizer's states alone
    assert "its disk has 0.0 GiB free" in full[0]
    monkeypatch.setattr(preflight_checks, "file_system", lambda _path: "ext4")
    several = check_output(Plan(), NANO, Paths(world.model, out=tmp_path / "new"), 2)
    assert any("see that every node has it" in finding.text for finding in several)


def test_disk_is_the_checkpoints_and_the_imported_base():
    trained = 33_368_064
    assert disk_bytes(Plan(), NANO, imports=False) == 14 * trained * 4  # two kept, one being written, the adapter
    assert disk_bytes(Plan(), NANO, imports=True) - disk_bytes(Plan(), NANO, imports=False) == 2 * NANO.parameters


def test_paths_that_the_container_does_not_see_are_refused(world, tmp_path):
    inside = ((tmp_path, tmp_path),)
    assert not check_mounts(Paths(tmp_path / "model", None, None, tmp_path / "out", inside))
    problems = wrong(check_mounts(Paths(tmp_path / "model", world.data, world.data, world.out, inside)))
    assert [text.split()[0] for text in problems] == ["--data", "--validation", "--out"]
    assert not check_mounts(Paths(world.model, world.data, world.data, world.out))  # no container


def test_a_mount_at_another_path_is_refused_where_a_path_relies_on_it(tmp_path):
    elsewhere = parse_mount(f"{tmp_path}:/workspace")
    found = wrong(check_mounts(Paths(tmp_path / "model", mounts=(elsewhere,))))
    assert "is mounted at /workspace/model" in found[0]
    assert f"mount {tmp_path}:{tmp_path}" in found[0]
    unused = parse_mount("/nowhere:/workspace")
    assert not check_mounts(Paths(tmp_path / "model", mounts=(elsewhere, unused, parse_mount(str(tmp_path)))))


def test_mounts_are_read_in_one_way():
    assert parse_mount("/a") == (Path("/a"), Path("/a"))
    assert parse_mount("/a:/b:ro") == (Path("/a"), Path("/b"))
    asked_for = asked("--hardware", "h100", "--container", "--mount", "/a:/b:ro", "--mount", "/c").paths.mounts
    assert asked_for == (parse_mount("/a:/b:ro"), parse_mount("/c"))
    for text in ("", "/a:", "a:b", "/a:/b:ro:rw", "/a:b"):
        with pytest.raises(UserError, match="is not OUTSIDE"):
            parse_mount(text)


def test_everything_on_disk_is_in_the_verdict(world):
    data, top = str(world.data), str(world.out.parent)
    arguments = ["--hardware", "h100", "--gpus-per-node", "1", "--model", str(world.model), "--data", data]
    arguments += ["--out", str(world.out), "--container", "--mount", top, "train.seq_length=64"]
    code, text = preflight.report(asked(*arguments), files=True)
    assert code == 0, text
    assert "one pass over the" in text
    arguments[arguments.index(data)] = f"{top}/none"
    code, text = preflight.report(asked(*arguments), files=True)
    assert code == 1
    assert "WRONG:" in text


def test_library_versions_are_those_of_the_environment_unless_there_is_a_container(monkeypatch):
    assert not wrong(preflight_checks.check_versions(container=True))
    assert not wrong(preflight_checks.check_versions(container=False))
    monkeypatch.setitem(preflight_checks.WANTED, "megatron-core", "0.0.1")
    monkeypatch.setitem(preflight_checks.WANTED, "no-such-package", "1.0")
    found = wrong(preflight_checks.check_versions(container=False))
    assert any("megatron-core is" in text and "written for 0.0.1" in text for text in found)
    assert any("no-such-package 1.0 is not installed" in text for text in found)


@pytest.mark.full
def test_the_documented_layouts_are_the_recommended_ones():
    text = (ROOT / "docs" / "launch.md").read_text()
    for name in ("h100", "gb200"):
        assert recommend_row(NANO, HARDWARE[name], 8) in text
