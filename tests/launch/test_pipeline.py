"""The pipeline: stages in order, finished ones not repeated, its jobs on Slurm chained; and all of it on pico."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.packing import build_packs
from evaluation.lineage import lineage, parts_of
from evaluation.report import report
from launch import pipeline
from launch.chain import submission
from launch.chain.records import Records
from launch.chain.stages import NAMES, RECIPE, Chain, Stage, recipe_script
from launch.slurm.cluster import Cluster
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.outputs import alone
from nano3.rows import write_rows
from nano3.token_store import TokenStore, tokenizer_sha256
from pico.tasks import DEMO, rows
from tests.helpers.tiny_store import tiny_store
from tests.launch.test_slurm import fake_slurm

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "pipeline.sbatch"


def toy_stages(folder: Path, fails: str = "", word: str = "") -> tuple[Stage, ...]:
    """Stages that append their name to a file, which is their output; `fails` ends with exit code 3 before that."""
    log = folder / "ran"

    def command(name: str) -> tuple[str, ...]:
        code = f"open({str(log)!r}, 'a').write({name + ' '!r}); open({str(folder / name)!r}, 'w'); {word!r}"
        return ("-c", f"raise SystemExit(3)  # {word}" if name == fails else code)

    source = folder / "questions.jsonl"
    if not source.exists():
        source.write_text("{}\n")
    return tuple(Stage(name, (command(name),), folder / name, (source,) if name == "prepare" else ()) for name in NAMES)


def run_toys(folder: Path, stages: tuple[Stage, ...]) -> tuple[int, list[str]]:
    """(exit code, stages that ran) of one call."""
    log = folder / "ran"
    log.write_text("")
    records = Records(folder)
    return pipeline.run_here(records.unfinished(stages), records), log.read_text().split()


def test_a_failed_stage_ends_the_run_and_the_next_goes_on_from_there(tmp_path, capsys):
    assert run_toys(tmp_path, toy_stages(tmp_path, fails="merge")) == (3, ["prepare", "import", "train"])
    assert "stage merge ended with exit code 3; the same command resumes from there" in capsys.readouterr().err
    assert Records(tmp_path).describe(toy_stages(tmp_path)[3], {}).startswith("FAILED with exit code 3")
    assert run_toys(tmp_path, toy_stages(tmp_path)) == (0, ["merge", "quantize", "evaluate"])
    assert run_toys(tmp_path, toy_stages(tmp_path)) == (0, [])


def test_a_stage_whose_command_fails_in_the_middle_is_not_finished(tmp_path):
    first, *_ = toy_stages(tmp_path)
    twice = Stage("prepare", (*first.commands, ("-c", "raise SystemExit(1)"), *first.commands), first.output)
    assert run_toys(tmp_path, (twice,)) == (1, ["prepare"])  # its output is there; the check after it failed
    assert Records(tmp_path).unfinished((twice,)) == (twice,)


def test_a_stage_that_is_done_over_is_unfinished_until_its_last_command_ends(tmp_path):
    """Killed there, its output is back and the check of it has not run."""
    first, *_ = toy_stages(tmp_path)
    assert run_toys(tmp_path, (first,)) == (0, ["prepare"])
    records = Records(tmp_path)
    with records.timed(first) as result:
        assert first.output.exists()
        assert records.unfinished((first,)) == (first,)
        result.code = 0
    assert records.unfinished((first,)) == ()


def test_a_training_that_outlived_its_pipeline_is_finished(tmp_path):
    records, (_, _, train, *_) = Records(tmp_path), toy_stages(tmp_path)
    killed = records.timed(train)
    killed.__enter__()  # and nobody leaves it
    assert records.unfinished((train,)) == (train,)
    (tmp_path / "lora").mkdir()
    other = toy_stages(tmp_path, word="other")[2]
    with alone(tmp_path / "lora", ""):  # its child trains on
        with pytest.raises(UserError, match="begun earlier still writes to"), records.timed(other):
            pass
        with pytest.raises(UserError, match="begun earlier still writes to"):
            records.forget("import", {})
    train.output.write_text("")  # and has ended
    assert records.unfinished((train,)) == ()
    with pytest.raises(UserError, match="train is finished, but was run with other settings"):
        records.unfinished((other,))


def test_an_adapter_that_was_there_before_is_not_the_trainings(tmp_path):
    records, (_, _, train, *_) = Records(tmp_path), toy_stages(tmp_path)
    train.output.write_text("")  # nobody knows what it was made with
    with records.timed(train):
        assert records.unfinished((train,)) == (train,)
    assert records.unfinished((train,)) == (train,)  # the recipe refuses, with an exit code that is not 0


def test_a_queued_job_is_not_taken_for_one_of_other_settings(tmp_path):
    stages, other, records = toy_stages(tmp_path), toy_stages(tmp_path, word="other"), Records(tmp_path)
    records.refuse_other_jobs(stages, {7: "PENDING"})  # nothing was planned
    records.plan(stages)
    records.submitted(stages[2], 7)
    records.refuse_other_jobs(stages, {7: "PENDING"})
    records.refuse_other_jobs(other, {8: "PENDING"})
    with pytest.raises(UserError, match=r"stage train is job 7, PENDING, with other settings; .*: scancel 7$"):
        records.refuse_other_jobs(other, {7: "PENDING"})


def test_no_job_is_chained_behind_one_that_can_never_start(tmp_path, monkeypatch):
    stages, records = toy_stages(tmp_path), Records(tmp_path)
    for number, stage in enumerate(stages, 1):
        records.submitted(stage, number)
    sent, cancelled = iter(range(11, 20)), []
    monkeypatch.setattr(submission, "hand_in", lambda *_: next(sent))
    monkeypatch.setattr(submission, "_submit_training", lambda *_: next(sent))
    monkeypatch.setattr(submission, "cancel", cancelled.append)
    alive = {2: "RUNNING", 4: "PENDING (DependencyNeverSatisfied)", 5: "PENDING (Dependency)"}
    submission.submit_all(stages[1:], records, Cluster("me", "gpu", logs=str(tmp_path)), tmp_path, alive)
    assert cancelled == [4, 5]  # the import goes on; the training before the merge is a new job
    assert [records.job(stage) for stage in stages] == [1, 2, 11, 12, 13, 14]


def test_what_is_finished_is_not_taken_for_something_else(tmp_path):
    run_toys(tmp_path, toy_stages(tmp_path))
    records = Records(tmp_path)
    with pytest.raises(UserError, match=r"prepare is finished, but was run with other settings; .* --again prepare"):
        records.unfinished(toy_stages(tmp_path, word="other"))
    (tmp_path / "questions.jsonl").write_text("{}\n{}\n")
    with pytest.raises(UserError, match=r"but was run before .*questions.jsonl changed"):
        records.unfinished(toy_stages(tmp_path))
    assert [stage.name for stage in records.unfinished(toy_stages(tmp_path), "prepare")] == list(NAMES)


def test_an_output_that_is_gone_is_not_made_behind_what_came_of_it(tmp_path):
    stages = toy_stages(tmp_path)
    run_toys(tmp_path, stages)
    (tmp_path / "import").unlink()
    with pytest.raises(UserError, match=r"stage train is finished but import before it is not.*--again import"):
        Records(tmp_path).unfinished(stages)
    (tmp_path / "evaluate").unlink()


def test_again_does_a_stage_and_what_follows_over_and_keeps_the_old_run(tmp_path):
    stages, records = toy_stages(tmp_path), Records(tmp_path)
    run_toys(tmp_path, stages)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").write_text("adapter")
    records.forget("merge", {})
    assert (tmp_path / "lora").exists()  # a merge does not touch the training
    assert run_toys(tmp_path, stages)[1] == ["merge", "quantize", "evaluate"]
    records.forget("train", {})
    assert (tmp_path / "lora.1" / "mine").read_text() == "adapter"
    assert run_toys(tmp_path, stages)[1] == ["train", "merge", "quantize", "evaluate"]
    records.submitted(stages[4], 12)
    with pytest.raises(UserError, match="stage quantize is job 12, which is queued or runs; cancel it first"):
        records.forget("merge", {12: "PENDING"})
    assert records.unfinished(stages[:3]) == ()


@pytest.fixture
def asked(tmp_path) -> list[str]:
    """Arguments of `run` on two nodes of H100."""
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    (tmp_path / "cluster.yaml").write_text(
        f"account: me\npartition: gpu\ncpu_partition: cpu\ncpu_cores: 16\ncpu_time: '12:00:00'\nlogs: {tmp_path}/logs\n"
        f"container: nemo.sqsh\nmounts: ['{tmp_path}:{tmp_path}', '{ROOT}:{ROOT}']\noptions: [qos=high]\n"
    )
    paths = ["--input", f"{tmp_path}/train.jsonl", "--questions", f"{tmp_path}/held.jsonl", "--out", f"{tmp_path}/out"]
    return ["run", "--model", "pico", *paths, "--nodes", "2", "--cluster", f"{tmp_path}/cluster.yaml"]


def script(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "pipeline.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)


def test_the_scripts_of_a_pipeline_are_the_checked_in_ones(tmp_path, asked):
    """After a wanted change: UPDATE_GOLDEN=1 pytest tests/launch/test_pipeline.py, and read the difference."""
    done = script(*asked, "--dry-run", "layout.cp=2", "train.seq_length=8192", "--with", "quantize=--samples 256")
    assert done.returncode == 0, done.stderr
    assert "fits: layout.cp=2" in done.stderr  # what preflight says of the training
    text = done.stdout.replace(str(ROOT), "/REPOSITORY").replace(str(tmp_path), "/lustre/me")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
    assert not (tmp_path / "out").exists()
    syntax = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (syntax.returncode, syntax.stderr) == (0, "")


def test_jobs_wait_for_each_other_and_are_not_submitted_twice(tmp_path, asked):
    fake = fake_slurm(tmp_path)
    (tmp_path / "sbatch").write_text(
        f"#!/bin/bash\nN=$(($(ls {tmp_path}/sent | wc -l) + 101))\ncat > {tmp_path}/sent/$N\necho $N\n"
    )
    (tmp_path / "squeue").write_text(
        f'#!/bin/bash\nfor N in $(ls {tmp_path}/sent); do echo "$N PENDING (Priority)"; done'
    )
    (tmp_path / "sent").mkdir()
    done = script(*asked, env=fake)
    assert done.returncode == 0, done.stderr
    sent = {int(path.name): path.read_text() for path in sorted((tmp_path / "sent").iterdir())}
    assert list(sent) == [101, 102, 103, 104, 105, 106]
    for number, text in sent.items():
        assert ("--dependency" in text) is (number > 101)
        assert f"--dependency=afterok:{number - 1}\n" in text or number == 101
        assert ("--partition=gpu" in text) is (number in (103, 106))
        assert ("--partition=cpu" in text) is (number not in (103, 106))
    assert "-m finetune.worker" in sent[103]
    assert json.loads((tmp_path / "out" / "lora" / "run.json").read_text())["base"] == f"{tmp_path}/out/base"
    again = script(*asked, env=fake)
    assert again.returncode == 0, again.stderr
    assert "train     job 103 is queued already: PENDING (Priority)" in again.stdout
    assert len(list((tmp_path / "sent").iterdir())) == 6
    other = script(*asked, "train.steps=400", env=fake)
    assert other.returncode == 2
    assert "stage train is job 103, PENDING (Priority), with other settings" in other.stderr
    assert "train.steps=400" not in (tmp_path / "out" / "pipeline.json").read_text()
    look = script("status", f"{tmp_path}/out", env=fake)
    assert "evaluate  job 106 PENDING (Priority)" in look.stdout
    for number in (101, 102, 103):  # these ended; the training wrote its adapter, the first two nothing
        (tmp_path / "sent" / str(number)).unlink()
    look = script("status", f"{tmp_path}/out", env=fake)
    assert "prepare   job 101 ended and did not finish it; see its log" in look.stdout
    for path in (tmp_path / "sent").iterdir():
        path.unlink()
    old = tiny_store(tmp_path / "out" / "data", 20, 60, 300, tokenizer=tokenizer_sha256("pico"))
    build_packs(TokenStore(old), 64)  # what lies there has no packs of the new length: it will be made anew
    again = script(*asked, "--again", "prepare", "train.seq_length=8192", env=fake)
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "sent").iterdir())) == 6


def test_a_training_that_would_not_start_stops_everything(tmp_path, asked):
    fake = fake_slurm(tmp_path)
    for wrong, words in (
        (["lora.rnk=3"], "did you mean lora.rank"),
        (["--model", "nano", "train.seq_length=262144"], "DOES NOT FIT"),
    ):
        done = script(*asked, *wrong, env=fake)
        assert done.returncode == 2
        assert words in done.stderr
        assert "nothing was run" in done.stderr
    assert not (tmp_path / "submitted").exists()
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_found_before(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("")
    chain = Chain(resolve_model("nano"), (tmp_path / "a",), tmp_path / "a", tmp_path)
    # Base and merged model of 58.8 GiB, 30.4 in FP8; before that the hidden states of calibration, 21; and while FP8 is
    # scored, 58.8 for its values.
    for free, refused in ((207, False), (206, True)):
        full = shutil._ntuple_diskusage(2**40, 0, free << 30)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, full=full: full)
        pipeline.check_room(chain, chain.stages()[4:])
        if refused:
            with pytest.raises(UserError, match=r"needs about 206\.9 GiB for import, merge, quantize, evaluate"):
                pipeline.check_room(chain, chain.stages())
        else:
            pipeline.check_room(chain, chain.stages())


def test_questions_that_the_container_does_not_see_are_refused(tmp_path, asked):
    site = tmp_path / "cluster.yaml"
    site.write_text(site.read_text().replace(f"{tmp_path}:{tmp_path}", f"{tmp_path}/out:{tmp_path}/out"))
    done = script(*asked, "--dry-run")
    assert done.returncode == 2
    assert f"--questions {tmp_path}/held.jsonl is not mounted into the container" in done.stderr


def test_refused_with_the_remedy(tmp_path, asked):
    local = asked[1:9]
    for wrong, words in (
        ([], "write run, status or stage"),
        (["status", str(tmp_path)], "holds no pipeline"),
        ([*asked, "--local"], "leave one of them out"),
        (["run", *local, "--local", "--with", "train=--x"], "only prepare, merge, quantize, evaluate"),
        (["run", *local, "--local", "--with", "merge=--nemo"], "write '--base dequantized' or leave it out"),
        (["run", *local, "--local", "--with", "merge=--base dequantized"], "give lora.base=nf4, or leave it out"),
        (["run", *local, "--local", "--with", "quantize"], "write STAGE=FLAGS"),
        (["run", *local, "--local", "--input", "/nowhere.jsonl"], "/nowhere.jsonl is not there"),
        (["run", *local[:-1], str(ROOT), "--local"], "exists and holds files that are not a pipeline"),
    ):
        done = script(*wrong)
        assert done.returncode == 2, wrong
        assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_the_run_knows_the_packs_that_it_needs(tmp_path):
    (tmp_path / "a").write_text("")
    pico = resolve_model("pico")
    chain = Chain(pico, (tmp_path / "a",), tmp_path / "a", tmp_path, ("layout.cp=4", "train.seq_length=64"))
    words = " ".join(chain.stages()[0].commands[-1])
    assert words.endswith("--seq-length 64 --pad-multiple 8")
    settings = ("train.pad_multiple=16", "train.steps=3")
    words = " ".join(Chain(pico, chain.inputs, chain.questions, tmp_path, settings).stages()[0].commands[-1])
    assert words.endswith("--seq-length 4096 --pad-multiple 16")


def test_a_dense_model_is_not_quantized(tmp_path):
    (tmp_path / "a").write_text("")
    chain = Chain(resolve_model("nano-4b"), (tmp_path / "a",), tmp_path / "a", tmp_path)
    assert [stage.name for stage in chain.stages()] == [name for name in NAMES if name != "quantize"]
    again = Records(tmp_path).unfinished(chain.stages(), "evaluate")
    assert [stage.name for stage in again] == [name for name in NAMES if name != "quantize"]  # nothing ran yet
    with pytest.raises(UserError, match="is dense, and no FP8 selection of it is known; remove it"):
        Chain(chain.model, chain.inputs, chain.questions, tmp_path, extra={"quantize": "--samples 4"})


@pytest.mark.parametrize(
    "settings", [{"settings": ("lora.base=nf4",)}, {"asked": ("lora.base=nf4",)}], ids=["given", "of the recipe"]
)
def test_no_copy_of_a_base_in_4_bits_is_imported(tmp_path, settings):
    """The ranks read the Hugging Face folder, and the merge is onto its weights unless one asks for others."""
    (tmp_path / "a").write_text("")
    pico = resolve_model("pico")
    chain = Chain(pico, (tmp_path / "a",), tmp_path / "a", tmp_path, **settings)
    stages = {stage.name: stage for stage in chain.stages()}
    assert list(stages) == [name for name in NAMES if name != "import"]
    assert "--base" not in stages["train"].commands[0]
    assert "--base" not in stages["merge"].commands[0]
    assert [stage.name for stage in Records(tmp_path).unfinished(chain.stages(), "import")] == list(stages)
    onto = replace(chain, extra={"merge": "--base dequantized"}).stages()
    assert next(stage for stage in onto if stage.name == "merge").commands[0][-2:] == ("--base", "dequantized")
    original = replace(chain, settings=("lora.base=original",))
    assert [stage.name for stage in original.stages()] == list(NAMES)


def test_one_process_goes_where_its_stage_belongs():
    site = Cluster("me", "gpu", cpu_partition="cpu", cpu_cores=16, cpu_time="12:00:00", options=["qos=high"])
    cpu, gpu = site.for_one_process(False), site.for_one_process(True)
    assert (cpu.partition, cpu.gpus_per_node, cpu.cpus_per_task, cpu.time, cpu.options) == (
        "cpu",
        0,
        16,
        "12:00:00",
        [],
    )
    assert (gpu.partition, gpu.gpus_per_node, gpu.options) == ("gpu", 1, ["qos=high"])
    assert Cluster("me", "gpu").for_one_process(False).partition == "gpu"


def questions(folder: Path) -> list[str]:
    """Arguments for a few questions of the demo's task in `folder`."""
    folder.mkdir(exist_ok=True)
    held = rows(DEMO, 12, 1)
    write_rows(folder / "held.jsonl", held)
    write_rows(folder / "train.jsonl", rows(DEMO, 60, 2))
    return ["--input", str(folder / "train.jsonl"), "--questions", str(folder / "held.jsonl")]


SMALL = [
    "layout.ep=2",
    "train.steps=3",
    "train.warmup=0",
    "train.seq_length=512",
    "train.global_batch=4",
    "lora.rank=4",
]
"""Settings with which pico trains for a few seconds."""


@pytest.mark.full
def test_the_whole_chain_on_pico_and_on_from_where_it_failed(tmp_path):
    chain = ["run", "--model", "pico", *questions(tmp_path), "--out", str(tmp_path / "out"), "--local", "--ranks", "2"]
    broken = script(*chain, *SMALL, "--with", "quantize=--samples 0")
    assert broken.returncode == 2
    assert "stage quantize ended with exit code 2" in broken.stderr
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in (out / "lora" / "adapter" / "lora.json", out / "merged")}
    done = script(*chain, *SMALL, "--with", "quantize=--samples 4 --tokens 64")
    assert done.returncode == 0, done.stderr
    assert "train     finished before" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (out / "fp8" / "hf_quant_config.json").is_file()
    scores = {name: json.loads((out / f"{name}.json").read_text()) for name in ("scores", "scores-base", "scores-fp8")}
    assert [(one["n"], one["settings"]["fp8_activations"]) for one in scores.values()] == [
        (12, False),
        (12, False),
        (12, True),
    ]
    links = {link.path.name: link for link in lineage(parts_of(out))}
    assert [link.problem for link in links.values()] == [""] * 8
    assert links["scores-fp8.json"].says.endswith("questions right, of fp8")
    assert links["fp8"].sha256 == scores["scores-fp8"]["model_sha256"]
    assert "What changed: scores to scores-fp8" in report(out).read_text()
    look = script("status", str(out)).stdout.splitlines()
    assert [line.split()[:2] for line in look] == [[name, "finished"] for name in NAMES]


@pytest.mark.full
def test_the_chain_of_a_base_in_4_bits_with_routers_that_balance(tmp_path):
    """Merged onto the weights that it saw, the moved biases with it; nothing but their hash was imported."""
    chain = ["run", "--recipe", "recipes.nemotron_qlora", "--model", "pico", *questions(tmp_path), "--local"]
    chain += ["--out", str(tmp_path / "out"), "--ranks", "2", "--with", "merge=--base dequantized"]
    done = script(*chain, *SMALL, "router=balance", "--with", "quantize=--samples 4 --tokens 64")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert not (out / "base").exists()
    assert [path.name for path in (out / "lora" / "base").iterdir()] == ["base.json"]
    certificate = json.loads((out / "merged" / "certificate.json").read_text())
    assert (certificate["merged_onto"], certificate["router"]) == ("dequantized", "balance")
    moved = [name for name, line in certificate["tensors"].items() if line.get("by") == ["router=balance"]]
    assert len(moved) == 4  # pico's routers
    links = {link.path.name: link.problem for link in lineage(parts_of(out))}
    assert links == dict.fromkeys(links, "")
    assert {"base", "adapter", "merged", "fp8", "scores.json", "scores-fp8.json"} <= set(links)
    look = script("status", str(out)).stdout.splitlines()
    assert [line.split()[:2] for line in look] == [[name, "finished"] for name in NAMES if name != "import"]


def test_the_recipe_that_is_not_named_is_ours_wherever_you_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = pipeline.parser().parse_args(["--model", "pico", "--input", "a", "--questions", "b", "--out", "c"])
    assert recipe_script(args.recipe, pipeline.ROOT) == RECIPE
