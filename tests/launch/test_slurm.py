"""Slurm scripts compared whole with checked-in files, and what becomes of the jobs that are submitted."""

from __future__ import annotations

import errno
import os
import shlex
import stat
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.packing import PackedDataset, build_packs
from finetune import run_cluster as cluster_run
from finetune.run_cluster import check_progress, job_of
from finetune.settings import Run, Settings, TrainSettings
from launch.slurm.cluster import Cluster
from launch.slurm.sbatch import Job, read_seeds, render
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.token_store import TokenStore, tokenizer_sha256
from tests.helpers.tiny import tiny_hf_folder
from tests.helpers.tiny_store import tiny_store

ROOT = Path(__file__).parents[2]
EXAMPLES, GOLDEN = ROOT / "launch" / "examples", ROOT / "tests" / "golden"
SITE = Cluster("my_account", "batch")
RUN = Job(
    "lora",
    ["-m", "finetune.worker", "runs/lora/run.json"],
    2,
    ["-m", "finetune.run_cluster", "runs/lora/run.json"],
    private="runs/lora/job.env",
)
LASTING = replace(RUN, out="runs/lora", private="/lustre/me/nano3/runs/slurm/lora.env")
"""As `finetune/run_cluster.py` describes a run."""

RESUMED = Run("/hf", "/nemo", "/store", None, "/runs/lora", 2, 2, True)
"""Submitted for a folder with checkpoints: the script is the first one's, since the job finds the newest itself."""


def example(name: str) -> Cluster:
    return Cluster.load(EXAMPLES / f"{name}.yaml")


SCRIPTS = {
    EXAMPLES / "h100-2x8.sbatch": lambda: render(example("h100-2x8"), LASTING),
    EXAMPLES / "b300-4x8.sbatch": lambda: render(example("b300-4x8"), replace(LASTING, nodes=4)),
    GOLDEN / "one-node-no-container.sbatch": lambda: render(
        replace(SITE, gres=False, setup=["module load cuda"], options=["qos=high"]), replace(RUN, nodes=1)
    ),
    GOLDEN / "array-of-seeds.sbatch": lambda: render(
        SITE, Job("seeds", ["-m", "finetune.worker", "runs/{seed}/run.json"], seeds=(1, 2, 3), out="runs/{seed}")
    ),
    GOLDEN / "resume.sbatch": lambda: render(replace(SITE, hardware="cpu", gpus_per_node=2), job_of(RESUMED)),
    GOLDEN / "after-another-job.sbatch": lambda: render(SITE, replace(RUN, after=1234)),
    GOLDEN / "cpu-nodes.sbatch": lambda: render(
        replace(SITE, partition="cpu", gpus_per_node=0, cpus_per_task=16, exclusive=False, signal_seconds=0),
        Job("prepare", ["data_prep/prepare.py", "--input", "my chats.jsonl"]),
    ),
}


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_scripts_are_the_checked_in_ones(file):
    """After a wanted change: UPDATE_GOLDEN=1 pytest tests/launch/test_slurm.py, and read the difference."""
    script = SCRIPTS[file]()
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
    assert script == file.read_text()


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_scripts_are_right_for_the_shell(file):
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def fake_slurm(folder: Path, number: str = "4711") -> dict[str, str]:
    """A PATH whose srun runs its command, whose scontrol names two nodes, and whose sbatch keeps what it is given."""
    tools = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": '[[ $2 == node ]] && echo "NodeName=$4 NodeAddr=10.0.0.7 Port=1" || printf "node7\\nnode8\\n"',
        "python": f'printf "%s|" "$@" >> {folder}/ran; echo >> {folder}/ran',
        "sbatch": f"cat > {folder}/submitted; echo {number}",
        "scancel": f"echo $1 > {folder}/cancelled",
        "squeue": 'echo "4711 RUNNING 1:00 of 4:00:00 on 2 nodes node[7-8]"',
    }
    for name, body in tools.items():
        tool = folder / name
        tool.write_text(f"#!/bin/bash\n{body}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[7-8]",
    }


def test_a_job_prepares_once_and_starts_a_launcher_that_finds_the_first_node(tmp_path):
    script = render(replace(SITE, workdir=str(tmp_path)), RUN)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=fake_slurm(tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    prepare, ranks = (tmp_path / "ran").read_text().splitlines()
    assert prepare == "launch/slurm/inside.py|-m|finetune.run_cluster|runs/lora/run.json|"
    assert "--rdzv-endpoint=10.0.0.7:24711|" in ranks  # nothing knows the name node7 here
    assert "--rdzv-id=4711|" in ranks
    assert "--nnodes=2|--nproc-per-node=8|" in ranks
    assert ranks.endswith("-m|finetune.worker|runs/lora/run.json|")


@pytest.mark.parametrize(("seeds", "name"), [((), "4711"), ((3,), "4700_3")])
def test_a_job_of_an_array_has_its_name_from_there_and_no_other_has(tmp_path, seeds, name):
    """A job that is submitted from within an array's has these variables too."""
    array = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"}
    job = replace(LASTING, seeds=seeds, out="{seed}") if seeds else LASTING
    script = render(replace(SITE, workdir=str(tmp_path)), job)
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    (tmp_path / "launch" / "slurm" / "survive.sh").write_text('echo "<$JOB>"; exit\n')
    environment = fake_slurm(tmp_path) | array
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment, check=False)
    assert done.stdout.splitlines()[-1] == f"<{name}>", done.stderr


def test_a_sites_own_lines_may_read_what_is_not_set(tmp_path):
    """As conda's and modules' scripts do; a variable of ours that is not set still ends the job."""
    site = replace(SITE, workdir=str(tmp_path), setup=['echo "<$NOT_SET>"'])
    script = render(site, RUN)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=fake_slurm(tmp_path), check=False)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "<>"), done.stderr
    without = {name: value for name, value in fake_slurm(tmp_path).items() if name != "SLURM_JOB_NODELIST"}
    assert subprocess.run(["bash"], input=script, text=True, capture_output=True, env=without, check=False).returncode


def test_a_sick_file_system_is_no_mistake_of_the_users(tmp_path, monkeypatch, capsys):
    """1 is tried again, on another node perhaps; 2 is not (launch/slurm/survive.sh)."""

    def stale(self: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(self))

    monkeypatch.setattr(sys, "argv", ["cluster_run", str(tmp_path / "run.json")])
    monkeypatch.setattr(Path, "read_text", stale)
    assert cluster_run.main() == 1
    assert "error: [Errno 116] Stale file handle" in capsys.readouterr().err


def test_everything_that_a_run_reads_is_looked_for_among_the_containers_mounts(tmp_path):
    model = tiny_hf_folder(tmp_path / "hf")
    run = Run(str(model), "/base", str(tmp_path / "store"), None, str(tmp_path / "out"), 1, 1, True)
    run.settings.lora.init_from = "/first"
    site = replace(SITE, hardware="cpu", container="image.sqsh", mounts=[f"{tmp_path}:{tmp_path}"])
    code, text = cluster_run.preflight(run, site)
    assert code
    for what in ("--base /base", "lora.init_from /first"):
        assert f"WRONG: {what} is not mounted into the container" in text
    elsewhere = replace(site, mounts=["/base:/base", "/first:/first"])
    assert f"WRONG: --model {model} is not mounted into the container" in cluster_run.preflight(run, elsewhere)[1]
    seen = replace(site, mounts=[*site.mounts, *elsewhere.mounts])
    assert "not mounted" not in cluster_run.preflight(run, seen)[1]


@pytest.mark.parametrize("after", [None, 5])
def test_the_steps_of_data_that_a_job_makes_anew_are_not_those_of_what_lies_there(after, tmp_path, monkeypatch):
    """60 documents in packs of 64, three passes in batches of 4; with --after the job's first step counts."""
    pico = resolve_model("pico")
    store = tiny_store(tmp_path / "store", 60, 60, 300, tokenizer=tokenizer_sha256(pico))
    build_packs(TokenStore(store), 64)
    settings = Settings(train=TrainSettings(global_batch=4, seq_length=64))
    out = tmp_path / "out"
    run = Run(str(pico), str(out / "base"), str(store), None, str(out), 1, 1, True, settings)
    monkeypatch.setattr(cluster_run, "preflight", lambda *_: (0, ""))
    monkeypatch.setattr(cluster_run, "hand_in", lambda *_: 7)
    assert cluster_run.submit(run, replace(SITE, environment={}), False, after) == 0
    steps = Run.from_json((out / "run.json").read_text()).settings.train.steps
    assert steps == (None if after else -(-3 * len(PackedDataset(store, 64)) // 4))


def test_a_failed_preparation_ends_the_job(tmp_path):
    environment = fake_slurm(tmp_path)
    (tmp_path / "python").write_text("#!/bin/bash\nexit 3\n")
    script = render(replace(SITE, workdir=str(tmp_path)), RUN)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment, check=False)
    assert done.returncode == 3


def script(*arguments: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "slurm.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)


def test_the_command_line_renders_submits_looks_and_cancels(tmp_path):
    environment, site = fake_slurm(tmp_path), str(EXAMPLES / "h100-2x8.yaml")
    job = ["--cluster", site, "--nodes", "2", "--name", "lora", "--prepare", shlex.join(RUN.prepare or [])]
    dry = script(*job, "--dry-run", "--", *RUN.command, env=environment)
    named = replace(RUN, private="/lustre/me/nano3/runs/slurm/lora.env")
    assert dry.stdout == render(example("h100-2x8"), named)
    lasting = script(*job, "--survive", "runs/lora", "--dry-run", "--", *RUN.command, env=environment)
    assert lasting.stdout == (EXAMPLES / "h100-2x8.sbatch").read_text()
    assert (
        "environment of cluster.yaml: not in the script; it goes to /lustre/me/nano3/runs/slurm/lora.env" in dry.stderr
    )
    assert "/lustre/me/hf" not in dry.stdout + dry.stderr
    assert not (tmp_path / "submitted").exists()
    (tmp_path / "cluster.yaml").write_text(f"account: me\npartition: batch\nlogs: {tmp_path}/logs\n")
    sent = script("--name", "x", "--", "-m", "finetune.worker", "r.json", env=environment, cwd=tmp_path)
    assert sent.stdout == f"submitted job 4711; logs in {tmp_path}/logs\n", sent.stderr
    assert "finetune.worker r.json" in (tmp_path / "submitted").read_text()
    assert script("status", "4711", env=environment).stdout.startswith("4711 RUNNING")
    assert script("cancel", "4711", env=environment).returncode == 0
    assert (tmp_path / "cancelled").read_text() == "4711\n"


def test_without_slurm_one_is_told_so(tmp_path):
    (tmp_path / "cluster.yaml").write_text("account: me\npartition: batch\n")
    done = script("--", "-m", "x", env=os.environ | {"PATH": "/nowhere"}, cwd=tmp_path)
    assert done.returncode == 2
    assert "sbatch is not here" in done.stderr
    assert "--dry-run" in done.stderr


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"command": []}, "no command"),
        ({"command": ["x"], "nodes": 0}, "--nodes 0"),
        ({"command": ["x"], "seeds": (1,)}, "an array of seeds requires {seed}"),
        ({"command": ["{seed}"]}, "requires --array"),
        ({"command": ["x"], "name": "a/b"}, "without / and %"),
        ({"command": ["x"], "out": "{seed}"}, "requires --array"),
    ],
)
def test_jobs_that_mean_nothing_are_refused(job, message):
    with pytest.raises(UserError, match=message):
        Job(**({"name": "x"} | job))


@pytest.mark.parametrize("text", ["1,x", "", "1,1", "2,-1"])
def test_seeds_are_different_whole_numbers(text):
    with pytest.raises(UserError, match=r"whole numbers|different"):
        read_seeds(text)


def test_what_the_shell_would_split_is_quoted():
    text = render(replace(SITE, options=["comment=two words"]), replace(RUN, name="my run"))
    assert "#SBATCH --job-name='my run'\n" in text
    assert "#SBATCH --output='runs/slurm/my run-%j.log'\n" in text
    assert "#SBATCH --comment='two words'\n" in text


def test_the_ranks_have_three_quarters_of_slurms_time_to_save(monkeypatch):
    """The script has the rest. What torch.distributed.run makes of the exported variable, not only that it is there."""
    from torch.distributed.launcher.api import LaunchConfig

    exported = dict(
        line.removeprefix("export ").split("=", 1)
        for line in render(replace(SITE, signal_seconds=77), RUN).splitlines()
        if line.startswith("export TORCH_")
    )
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", exported["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 57
    assert "SHUTDOWN_TIMEOUT" not in render(replace(SITE, signal_seconds=0), RUN)


@pytest.mark.parametrize(
    ("logs", "state", "code"), [(["x-4711.log"], "COMPLETED", 0), (["x-4711_1.log", "x-4711_2.log"], "FAILED", 1)]
)
def test_the_logs_of_a_job_and_of_an_array_are_followed_to_their_end(tmp_path, logs, state, code):
    environment = fake_slurm(tmp_path)
    (tmp_path / "tail").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/followed\nexec sleep 60\n')
    (tmp_path / "tail").chmod(0o755)
    (tmp_path / "squeue").write_text(f"#!/bin/bash\n[[ -e {tmp_path}/followed ]] || echo RUNNING\n")
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho JobState=$STATE Reason=None\n")
    (tmp_path / "cluster.yaml").write_text(f"account: me\npartition: batch\nlogs: {tmp_path}\n")
    for name in [*logs, "x-14711.log", "x-47110_1.log"]:
        (tmp_path / name).write_text("")
    done = script("follow", "4711", env=environment | {"STATE": state}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, f"job 4711: {state}\n")
    assert (tmp_path / "followed").read_text().split()[3:] == [f"{tmp_path}/{name}" for name in logs]


@pytest.mark.parametrize(
    ("time", "minutes", "message"),
    [
        ("01:00:00", 50.0, None),
        ("01:00:00", 55.1, "checkpoint.minutes=55.1, .* Give at most 55, or a longer time"),
        ("30", 30.0, "Give at most 25"),
        ("1-00", 15.0, None),
        ("infinite", 1e6, None),
        ("01:00:00", 0.0, "a job may be gone at any step"),
    ],
)
def test_a_job_too_short_for_a_checkpoint_is_refused(time, minutes, message):
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_progress(minutes, replace(SITE, time=time))


def test_nodes_without_gpus_start_their_cpu_ranks():
    site = replace(SITE, hardware="cpu", gpus_per_node=3)
    assert "gpu" not in render(site, RUN)
    assert "--nproc-per-node=3 " in render(site, RUN)
    assert "NCCL" not in render(site, RUN)


def recipe(*arguments: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "recipes" / "nemotron_lora.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)


def test_the_recipe_looks_first_and_submits_what_fits(tmp_path):
    environment = fake_slurm(tmp_path)
    model = tiny_hf_folder(tmp_path / "hf")
    data = tiny_store(tmp_path / "store", 40, 60, 128, tokenizer=tokenizer_sha256(model))
    build_packs(TokenStore(data), 64)
    out = tmp_path / "runs" / "mine"
    arguments = ["--model", str(model), "--data", str(data), "--out", str(out), "--nodes", "2", "train.seq_length=64"]
    bare = recipe(*arguments, env=environment, cwd=tmp_path)
    assert bare.returncode == 2
    assert "--nodes 2 needs a cluster, which cluster.yaml would describe: copy" in bare.stderr
    assert "fill in account and partition" in bare.stderr
    (tmp_path / "cluster.yaml").write_text(f"account: me\npartition: batch\nlogs: {tmp_path}/logs\n")
    dry = recipe(*arguments, "--dry-run", "--cluster", "cluster.yaml", env=environment, cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "fits: layout.ep=8 on 16 h100" in dry.stderr
    assert not (tmp_path / "submitted").exists()
    sent = recipe(*arguments, env=environment, cwd=tmp_path)
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout == f"submitted job 4711; logs in {tmp_path}/logs\n"
    assert (tmp_path / "submitted").read_text() == (out / "job.sbatch").read_text()
    assert dry.stdout.endswith((out / "job.sbatch").read_text())
    assert Run.from_json((out / "run.json").read_text()).nodes == 2
    (tmp_path / "submitted").unlink()
    again = recipe(*arguments, env=environment, cwd=tmp_path)
    assert again.returncode == 2
    assert f"job 4711 writes to {out} or waits to: 4711 RUNNING" in again.stderr
    many = tmp_path / "runs" / "many"
    sent = recipe(*arguments, "--array", "3,5", "--out", str(many), env=environment, cwd=tmp_path)
    assert sent.returncode == 0, sent.stderr
    assert " GiB for 2 runs and its disk has " in sent.stderr
    text = (tmp_path / "submitted").read_text()
    assert "#SBATCH --array=3,5\n" in text
    assert f'OUT={many}/seed-"$SLURM_ARRAY_TASK_ID"\n' in text
    assert f'-m finetune.worker {many}/seed-"$SLURM_ARRAY_TASK_ID"/run.json' in text
    for seed in (3, 5):
        run = Run.from_json((many / f"seed-{seed}" / "run.json").read_text())
        assert (run.settings.train.seed, run.out) == (seed, f"{many}/seed-{seed}")
        assert run.base == f"{many}/seed-{seed}/base"
        assert (many / f"seed-{seed}" / "job").read_text() == f"4711_{seed}\n"
    again = recipe(*arguments, "--array", "3,5", "--out", str(many), env=environment, cwd=tmp_path)
    assert f"job 4711_3 writes to {many}/seed-3 or waits to: 4711 RUNNING" in again.stderr
    (tmp_path / "submitted").unlink()
    huge = recipe(*arguments[:-1], "train.seq_length=48", env=environment, cwd=tmp_path)
    assert huge.returncode == 2
    assert "has no packs-48" in huge.stderr
    local = recipe(*arguments, "--overwrite", env=environment, cwd=tmp_path)
    assert "--overwrite is for runs on this machine" in local.stderr
    assert not (tmp_path / "submitted").exists()
