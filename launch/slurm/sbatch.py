"""One description of a job, rendered as a plain sbatch script.

The job's command runs on every GPU under torchrun, one launcher per node; what prepares it runs first, once. Before
each, launch/slurm/inside.py compares the packages there with the tested ones. All text is quoted by
launch/slurm/shell.py. The site's `environment` is not in the script: it lies beside it, in a file that is yours alone.
Imports neither torch nor NeMo.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.slurm.cluster import EXAMPLE, Cluster
from launch.slurm.job_queue import submit
from launch.slurm.shell import SEED, option, quote, refuse_unwritable, words, write_private
from nano3.cli import UserError

RENDEZVOUS = '--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MASTER_ADDR:$((20000 + SLURM_JOB_ID % 10000))"'
"""Where rank 0's node listens for the others: another port for every job, below those that the kernel gives away."""
INSIDE = "launch/slurm/inside.py"
"""Runs python's arguments where the packages are those that were tested."""

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",  # logs as they happen
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a rank that is gone ends the others instead of leaving them to wait
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",  # memory of communicated tensors is free as soon as they are
    "NCCL_NVLS_ENABLE": "0",  # its buffers cost memory that the plan has not
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron-Core orders its communication by it under tensor parallelism
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # the plan's margin for fragmentation counts on it
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of every GPU job, each with its reason. A site's own `environment` comes after and wins."""


@dataclass
class Job:
    """What is to run."""

    name: str
    command: list[str]
    """Arguments of python on every rank, such as ["-m", "finetune.worker", "OUT/run.json"]."""
    nodes: int = 1
    prepare: list[str] | None = None
    """Arguments of python that run first, once, on the first node."""
    seeds: tuple[int, ...] = ()
    """One job of an array for each; `{seed}` in the command is replaced."""
    after: int | None = None
    """Job that must have succeeded before."""
    out: str | None = None
    """Folder of a run that goes on from its checkpoints when it is started again: its job survives, see survive.sh."""
    ranks: bool = True
    """False: one process of the command, without torch.distributed.run."""
    private: str = ""
    """File for the site's `environment`, beside what the job writes; needed where there is one."""
    at_once: int = 0
    """Most jobs of the array that run at the same time; 0 leaves it to Slurm."""
    retries: int = 0
    """How often a job of an array is requeued that fails; not after a user's mistake, exit code 2."""

    def __post_init__(self) -> None:
        for text in [self.name, *self.command, *(self.prepare or []), self.out or "", self.private]:
            refuse_unwritable(f"{text!r}", text)
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes} must be at least 1")
        if not self.name.isprintable() or not self.name or set("/%") & set(self.name):
            raise UserError(f"the job's name {self.name!r} is part of its log's; write one without / and %")
        if not self.command:
            raise UserError(
                "no command: write what runs on every rank after --, such as -- -m finetune.worker RUN.json"
            )
        text = " ".join([*self.command, *(self.prepare or []), self.out or ""])
        if self.retries and not (self.seeds and not self.ranks):
            raise UserError("retries are of an array's jobs of one process; ranks have survive.sh")
        if bool(self.seeds) != (SEED in text):
            raise UserError("an array of seeds requires {seed} in the command, and {seed} requires --array SEEDS")


def sbatch_options(cluster: Cluster, job: Job) -> dict[str, str]:
    """sbatch's options by their long names; an empty string has no value."""
    options = {
        "job-name": job.name,
        "account": cluster.account,
        "partition": cluster.partition,
        "time": cluster.time,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "output": f"{cluster.logs.replace('%', '%%')}/{job.name}-%{'A_%a' if job.seeds else 'j'}.log",
        "open-mode": "append",
        "requeue": "",
    }
    if cluster.gres and cluster.gpus:
        options["gres"] = f"gpu:{cluster.gpus}"
    if cluster.cpus_per_task:
        options["cpus-per-task"] = str(cluster.cpus_per_task)
    if cluster.exclusive:
        options["exclusive"] = ""
    if cluster.signal_seconds:
        # B: to the script, which passes it on and has the job requeued; without, to the processes only.
        options["signal"] = f"{'B:' if job.out else ''}TERM@{cluster.signal_seconds}"
    if job.seeds:
        options["array"] = _ranges(job.seeds) + (f"%{job.at_once}" if job.at_once else "")
    if job.after is not None:
        options["dependency"] = f"afterok:{job.after}"
        options["kill-on-invalid-dep"] = "yes"  # or it would wait forever for what has failed
    options.update(dict(item.partition("=")[::2] for item in cluster.options))
    return options


def srun_command(cluster: Cluster) -> str:
    """srun with the container and its mounts (Pyxis); a step ends when one of its tasks does, and the ranks of a
    launcher share the cores of their node."""
    options = ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    if cluster.cpus_per_task:  # which a step does not have from its job, since Slurm 22.05
        options.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.container is not None:
        options += [f"--container-image={cluster.container}", f"--container-workdir={cluster.project}"]
        options += [f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else []
    return words(["srun", *options])


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables of every process that are ours: what GPUs need, and how long the ranks may take to save.

    torch.distributed.run passes SIGTERM on to its ranks and kills them 30 s later unless it is told how long to wait:
    three quarters of the time before Slurm ends the job, which leaves the script some to have it requeued.
    """
    own = ENVIRONMENT if cluster.gpus else {"PYTHONUNBUFFERED": "1"}
    if cluster.signal_seconds:
        own = own | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, cluster.signal_seconds * 3 // 4))}
    return own


def private_environment(cluster: Cluster) -> str:
    """What the file `Job.private` holds: the site's variables, for bash."""
    return "".join(f"export {name}={quote(value)}\n" for name, value in cluster.environment.items())


def render(cluster: Cluster, job: Job) -> str:
    """The sbatch script, whole."""
    lines = ["#!/bin/bash", "# Made by launch/slurm/sbatch.py: change cluster.yaml or the command line, not this file."]
    if blanks := cluster.blanks():
        lines.append(f"# FILL IN what says so below ({', '.join(blanks)}): in cluster.yaml, a copy of {EXAMPLE.name}.")
    lines += [option(name, value) for name, value in sbatch_options(cluster, job).items()]
    lines += ["", *_settings(cluster, job)]
    srun = srun_command(cluster)
    if not job.ranks:
        one = f"{srun} --nodes=1 --ntasks=1 {_python(cluster, job.command)}"
        ending = _retried(one, job.retries) if job.retries else [f"exec {one}"]
        return "\n".join([*lines, "", *ending]) + "\n"
    lines += _RENDEZVOUS
    if job.out is not None:
        lines += ["", "# What befalls the job, it survives: launch/slurm/survive.sh says how."]
        # One job of an array has the array's own number, which means all of them. Not for the shell to find out: a job
        # that is submitted from within an array's has these variables too.
        name = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.seeds else "$SLURM_JOB_ID"
        lines += [f"OUT={words([job.out])}", f'JOB="{name}"', "source launch/slurm/survive.sh"]
    if job.prepare is not None:
        lines += ["", "# Once, before the ranks start."]
        before = "survive " if job.out is not None else ""
        lines += [f"{before}{srun} --nodes=1 --ntasks=1 {_python(cluster, job.prepare)}"]
    torchrun = ["-m", "torch.distributed.run", f"--nnodes={job.nodes}", f"--nproc-per-node={cluster.ranks_per_node}"]
    # exec: signals reach srun, and its exit code is the job's.
    start, end = ("survive ", ["finished"]) if job.out is not None else ("exec ", [])
    lines += ["", f"# One launcher per node, {'one rank per GPU' if cluster.gpus else 'which starts its ranks'}."]
    lines += [f"{start}{srun} {_python(cluster, torchrun)} --rdzv-backend=c10d {RENDEZVOUS} \\"]
    return "\n".join([*lines, f"    {words(job.command)}", *end]) + "\n"


def _ranges(numbers: tuple[int, ...]) -> str:
    """What sbatch's --array takes: `(1, 2, 3, 7)` -> `1-3,7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _retried(command: str, retries: int) -> list[str]:
    """Lines that run an array's job and have this one job requeued when it fails."""
    return [
        f"# Exit code 2 is a user's mistake, which no repetition mends; all else is tried again, {retries} times.",
        "CODE=0",
        f"{command} || CODE=$?",
        f"((CODE == 0 || CODE == 2 || ${{SLURM_RESTART_COUNT:-0}} >= {retries})) ||",
        '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        'exit "$CODE"',
    ]


def _settings(cluster: Cluster, job: Job) -> list[str]:
    """Where the job runs, and its variables."""
    # -u after the site's lines: conda's and modules' own scripts read variables that are not set.
    lines = ["set -eo pipefail", f"cd -- {quote(cluster.project)}", *cluster.setup, "set -u"]
    lines += [f"export {name}={quote(value)}" for name, value in environment(cluster).items()]
    if cluster.environment:
        assert job.private
        lines += ["# The site's variables; the file is yours alone (mode 0600).", f"source {quote(job.private)}"]
    # The project is not installed in a container, and what is installed there is not what was tested.
    packages = f'":{quote(cluster.packages)}"' if cluster.packages else ""
    return [*lines, f'export PYTHONPATH="$PWD{packages}${{PYTHONPATH:+:$PYTHONPATH}}"']


_RENDEZVOUS = [
    # Not head: it would end scontrol with SIGPIPE, and pipefail the job with it.
    'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"',
    "# By its name a machine knows itself. Where the name means nothing to the network: the address that Slurm uses.",
    'getent hosts "$MASTER_ADDR" > /dev/null ||',
    '    MASTER_ADDR="$(scontrol show node "$MASTER_ADDR" | sed -n \'s/.*NodeAddr=\\([^ ]*\\).*/\\1/p\')"',
    "export MASTER_ADDR",
    'echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"',
]
"""Where the first node listens for the others."""


def _python(cluster: Cluster, arguments: list[str]) -> str:
    return words([cluster.python, INSIDE, *arguments])


def hand_in(cluster: Cluster, job: Job) -> int:
    """Submits a job, its private file written before; its number. `UserError` with sbatch's words when it refuses."""
    if cluster.environment:
        write_private(Path(job.private), private_environment(cluster))
    return submit(render(cluster, job), Path(cluster.logs))


def private_note(cluster: Cluster, job: Job) -> str:
    """For people who look at a script: where the site's variables will be; empty when there are none."""
    if not cluster.environment:
        return ""
    return f"environment of cluster.yaml: not in the script; it goes to {job.private}, which only you can read (0600)"


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds in `1,2,3`, all different; `UserError` otherwise."""
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise UserError(f"--array {text}: write whole numbers, such as 1,2,3") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--array {text}: seeds must be different, and at least 0")
    return seeds
