"""The recipe on a real Slurm: two nodes train what two local ranks train, and nothing that befalls a job changes it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from conversion.checkpoint.torch_dist import TorchDistReader
from conversion.hf_to_nemo import convert
from data_prep.packing import build_packs
from finetune.sweep.study import Study
from launch.slurm.cluster import Cluster
from launch.slurm.sbatch import Job, private_environment, render
from launch.slurm.shell import write_private
from nano3.arch import resolve_model
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.helpers.slurm_site import NODES, Slurm, only_site, processes_of, require_slurm, slurm_site
from tests.helpers.tiny_run import metrics
from tests.helpers.tiny_store import tiny_store
from tests.launch.test_bundle import image

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
STEPS = 40
SITE = {
    "account": "tests",
    "partition": "batch",
    "time": "01:00:00",
    "hardware": "cpu",
    "gpus_per_node": 1,
    "exclusive": False,
    "signal_seconds": 120,
    "workdir": str(ROOT),
    "python": sys.executable,
    "environment": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    require_slurm()
    with only_site(), slurm_site() as site:
        yield site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pico, imported, a store of its tokenizer, and the site file."""
    folder = tmp_path_factory.mktemp("slurm")
    pico = resolve_model("pico")
    convert(pico, folder / "base", context=False)
    build_packs(TokenStore(tiny_store(folder / "store", 60, 60, 300, tokenizer=tokenizer_sha256(pico))), 64)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(SITE | {"logs": str(folder / "logs")}))
    return folder


def recipe(folder: Path, name: str, *arguments: str, **environment: str) -> str:
    """What `nemotron_lora.py` prints; an AssertionError with its words when it fails."""
    command = [sys.executable, str(ROOT / "recipes" / "nemotron_lora.py"), "--model", "pico"]
    command += ["--base", str(folder / "base"), "--data", str(folder / "store"), "--out", str(folder / name)]
    command += ["layout.ep=2", "lora.rank=4", "lora.dropout=0.1", f"train.steps={STEPS}", "train.warmup=2"]
    command += ["train.global_batch=4", "train.seq_length=64", "checkpoint.every=5", "log.every=1"]
    command += ["log.wandb=off", "log.tensorboard=false", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """The run on two ranks of this machine, undisturbed."""
    recipe(folder, "local", "--local", "--ranks", "2", OMP_NUM_THREADS="1")
    return folder / "local"


def assert_same(one: Path, other: Path) -> None:
    """Equal adapters and losses, bit for bit, each step once."""
    ours, theirs = (TorchDistReader(out / "adapter" / "weights") for out in (one, other))
    assert set(ours.shapes) == set(theirs.shapes)
    for key in ours.shapes:
        assert torch.equal(ours.whole(key).view(torch.uint8), theirs.whole(key).view(torch.uint8)), key
    rows = [[(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in metrics(out)] for out in (one, other)]
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == list(range(1, STEPS + 1))


def submit(slurm: Slurm, folder: Path, name: str) -> int:
    said = recipe(folder, name, "--nodes", "2", **slurm.environment)
    return int(said.split("submitted job ")[1].split(";")[0])


def frozen_after(slurm: Slurm, number: int, out: Path, step: int) -> list[int]:
    """The processes of the job's two ranks, by node, stopped once `step` is done: what happens next is in mid-run."""
    begun = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0

    def ranks() -> list[int]:
        here = {"SLURM_JOB_ID": str(number), "LOCAL_RANK": "0"}
        return [processes_of(slurm, SLURMD_NODENAME=node, **here)[0] for node in NODES]  # before its helpers

    def reached() -> bool:
        assert slurm.job(number)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), slurm.log(number)
        return (out / "metrics.jsonl").exists() and len(metrics(out)) >= max(step, begun + 1)

    slurm.until(reached, f"step {step}", 900, lambda: slurm.log(number))
    found = ranks()
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    assert len(metrics(out)) < STEPS, "the run was over before anything could befall it"
    return found


def thaw(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def resumed(slurm: Slurm, number: int) -> str:
    """The whole log of a job that was started again and ended well.

    Not always started once: it waits 5 s here, where clusters wait 120, and what Slurm does late to the step that died
    can meet the new step of the same number. Then it is started once more, and must end the same.
    """
    job = slurm.wait(number, "COMPLETED")
    assert int(job["Restarts"]) >= 1
    log = slurm.log(number)
    assert "resumed at step" in log, log
    return log


@pytest.fixture(scope="module")
def hopeless(slurm: Slurm, folder: Path) -> tuple[int, Path]:
    """A job whose ranks die at once, whenever it starts; it is looked at when the others are through."""
    site, out = Cluster.load(folder / "cluster.yaml"), folder / "hopeless"
    out.mkdir()
    write_private(out / "job.env", private_environment(site))
    script = render(site, Job("hopeless", ["--no-python", "false"], 2, out=str(out), private=str(out / "job.env")))
    Path(site.logs).mkdir(exist_ok=True)
    return slurm.submit(script), out


@pytest.mark.usefixtures("hopeless")
def test_two_nodes_train_what_two_local_ranks_train(slurm, folder, reference):
    number = submit(slurm, folder, "nodes")
    assert slurm.wait(number, "COMPLETED")["NodeList"] == "node[1-2]"
    assert_same(folder / "nodes", reference)
    assert not (folder / "nodes" / "job").exists()


BARE = ["layout.ep=2", "lora.rank=4", "train.steps=3", "train.warmup=0", "train.global_batch=4", "train.seq_length=64"]


def test_the_bare_line_trains_on_two_nodes_and_sends_what_its_dry_run_prints(slurm, folder, tmp_path):
    """From a folder whose name a shell would take for much else, with an interpreter that has no project installed."""
    here = tmp_path / "it's $(touch PWNED) `touch PWNED` #1"
    here.mkdir()
    content = SITE | {"logs": str(here / "logs"), "model": "pico", "data": str(folder / "store"), "settings": BARE}
    content |= {"python": str(image(tmp_path / "image", set())), "options": ["comment=it's $(touch PWNED) #1"]}
    (here / "cluster.yaml").write_text(yaml.safe_dump(content))

    def line(*more: str) -> str:
        command = [sys.executable, str(ROOT / "recipes" / "nemotron_lora.py"), "--nodes", "2", *more]
        done = subprocess.run(
            command, cwd=here, env=os.environ | slurm.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    dry = line("--dry-run")
    number = int(line().split("submitted job ")[1].split(";")[0])
    sent = slurm.run("scontrol", "write", "batch_script", str(number), "-")
    assert dry[dry.index("#!/bin/bash") :] == sent
    assert slurm.wait(number, "COMPLETED")["NodeList"] == "node[1-2]"
    shown = slurm.run("scontrol", "show", "job", str(number))
    assert "Comment=it's $(touch PWNED) #1" in shown
    assert f"StdOut={here}/logs/lora-{number}.log" in shown
    assert (here / "runs" / "lora" / "adapter" / "lora.json").exists()
    assert len(metrics(here / "runs" / "lora")) == 3
    assert not [*tmp_path.rglob("PWNED"), *ROOT.glob("PWNED")]


def test_a_sweep_is_an_array_of_runs_and_goes_on_from_their_results(slurm, folder):
    """Three trials, two at a time: an array of two, then one of the third. Each is a run with its own adapter."""
    out, pico = folder / "sweep", resolve_model("pico")
    held = tiny_store(folder / "validation", 10, 60, 300, seed=1, tokenizer=tokenizer_sha256(pico))
    build_packs(TokenStore(held), 64)
    command = [sys.executable, str(ROOT / "recipes" / "sweep.py"), "--cluster", "cluster.yaml", "--model", "pico"]
    command += ["--base", str(folder / "base"), "--data", str(folder / "store"), "--validation", str(held)]
    command += ["--out", str(out), "--try", "lora.rank=2,4", "--try", "train.lr=1e-5..1e-3:log", "--trials", "3"]
    command += ["--jobs", "2", "--follow", "layout.ep=1", "train.steps=2", "train.warmup=0", "train.global_batch=2"]
    command += ["train.seq_length=64", "log.wandb=off", "log.tensorboard=false"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | slurm.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    arrays = [int(number) for number in re.findall(r"submitted job (\d+)", done.stdout)]
    sizes = [len(slurm.run("squeue", "-h", "-r", "-t", "all", f"--jobs={one}").splitlines()) for one in arrays]
    assert sizes == [2, 1], done.stdout
    trials = Study.read(out).trials()
    assert [one.state.name for one in trials] == ["COMPLETE"] * 3
    for number, one in enumerate(trials):
        assert (out / "trials" / str(number) / "adapter" / "lora.json").is_file()
        assert metrics(out / "trials" / str(number))[-1]["validation_loss"] == one.value


def test_sigterm_before_the_time_limit_loses_no_step_and_nobody_else_may_write(slurm, folder, reference):
    """Slurm's own signal: the job's time is cut while its ranks stand still, and the ranks go on once it has come."""
    out = folder / "limit"
    number = submit(slurm, folder, "limit")
    ranks = frozen_after(slurm, number, out, 8)
    with pytest.raises(AssertionError, match=f"error: job {number} writes to {out} or waits to"):
        submit(slurm, folder, "limit")
    second = slurm.submit((out / "job.sbatch").read_text())
    slurm.wait(second, "FAILED")
    assert f"error: job {number} writes to {out}; wait for it" in slurm.log(second)
    # One to two minutes from now: Slurm looks at time limits every 30 s, and must not come too late for the signal.
    minutes = 2 + int(slurm.run("squeue", "--noheader", f"--jobs={number}", "--Format=TimeUsed").split(":")[-2])
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
    slurm.until(lambda: "SIGTERM" in slurm.log(number), "SIGTERM", 120, lambda: slurm.log(number))
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    done = len(metrics(out))
    thaw(ranks)
    log = resumed(slurm, number)
    ended = int(re.findall(r"SIGTERM: ended after step (\d+)", log)[0])
    assert done <= ended <= done + 1
    assert f"resumed at step {ended} " in log
    assert_same(out, reference)


def test_a_job_that_slurm_requeues_goes_on(slurm, folder, reference):
    number = submit(slurm, folder, "requeued")
    thaw_later = frozen_after(slurm, number, folder / "requeued", 8)
    slurm.run("scontrol", "requeue", str(number))
    thaw(thaw_later)
    resumed(slurm, number)
    assert_same(folder / "requeued", reference)


def test_a_node_whose_step_is_killed_is_named_and_the_job_goes_on(slurm, folder, reference):
    number = submit(slurm, folder, "killed")
    ranks = frozen_after(slurm, number, folder / "killed", 8)
    launcher = int(Path(f"/proc/{ranks[1]}/stat").read_text().rpartition(")")[2].split()[1])  # its parent (proc(5))
    os.kill(launcher, signal.SIGKILL)  # and its rank ends with it, though it stands still
    thaw(ranks[:1])
    log = resumed(slurm, number)
    assert re.search(r"this attempt ended with exit code \d+: node2: task 1: Killed", log), log
    assert_same(folder / "killed", reference)


def test_a_node_that_goes_down_is_named_and_the_job_goes_on_when_it_is_back(slurm, folder, reference):
    number = submit(slurm, folder, "down")
    ranks = frozen_after(slurm, number, folder / "down", 8)
    slurm.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=pulled the plug")
    for pid in processes_of(slurm, SLURM_JOB_ID=str(number), SLURMD_NODENAME="node2"):
        with suppress(ProcessLookupError):  # its launcher was quicker
            os.kill(pid, signal.SIGKILL)
    thaw(ranks[:1])
    slurm.wait(number, "PENDING")
    slurm.until(lambda: "node node2 is down" in slurm.log(number), "the node's name", 60, lambda: slurm.log(number))
    slurm.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    resumed(slurm, number)
    assert_same(folder / "down", reference)


def test_after_three_deaths_at_one_step_a_job_stops_and_says_why(slurm, hopeless):
    number, out = hopeless
    assert slurm.wait(number, "FAILED")["Restarts"] == "3"
    log = slurm.log(number)
    assert "error: after step 0 this run died 3 times and got no further" in log
    assert [line.split(":")[0] for line in log.splitlines() if line.startswith("  restart ")] == [
        f"  restart {restart} on node[1-2]" for restart in range(3)
    ]
    assert not (out / "job").exists()


SITE_AND_JOB = """
import time
from tests.helpers.slurm_site import slurm_site

with slurm_site() as site:
    site.submit("#!/bin/bash\\n#SBATCH --output=/dev/null\\nsetsid sleep 600")
    print(site.folder, flush=True)
    time.sleep(600)
"""


def test_nothing_of_a_private_slurm_outlives_a_killed_test():
    require_slurm()
    test = subprocess.Popen([sys.executable, "-c", SITE_AND_JOB], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert test.stdout is not None
    slurm = Slurm(Path(test.stdout.readline().strip()))
    slurm.until(lambda: slurm.job(1)["JobState"] == "RUNNING", "the job to run")
    assert len(processes_of(slurm)) >= 5  # munged, controller, two nodes, and the job's
    test.kill()
    test.wait()
    slurm.until(lambda: not processes_of(slurm) and not slurm.folder.exists(), "everything to be gone")
