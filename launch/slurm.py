"""Slurm: one description of a job, rendered as a plain sbatch script or, for NeMo-Run, as its executor.

    python launch/slurm.py --cluster cluster.yaml --nodes 2 --name lora --dry-run -- -m recipes.worker OUT/run.json
    python launch/slurm.py --cluster cluster.yaml status 1234        # or cancel 1234, follow 1234

What is after `--` runs on every GPU under torchrun, one launcher per node; what `--prepare` names runs first, once.
`launch/slurm_nemo_run.py` makes a NeMo-Run executor from the same two objects. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import Cluster
from nano3.cli import UserError, run

PORT = "$((20000 + SLURM_JOB_ID % 10000))"
"""Where rank 0's node listens for the others: another port for every job, below those that the kernel gives away."""

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
    """Arguments of python on every rank, such as ["-m", "recipes.worker", "OUT/run.json"]."""
    nodes: int = 1
    prepare: list[str] | None = None
    """Arguments of python that run first, once, on the first node."""
    seeds: tuple[int, ...] = ()
    """One job of an array for each; `{seed}` in the command is replaced."""
    after: int | None = None
    """Job that must have succeeded before."""
    ranks: bool = True
    """False: one process of the command, without torch.distributed.run."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes} must be at least 1")
        if not self.name.isprintable() or not self.name or set("/%") & set(self.name):
            raise UserError(f"the job's name {self.name!r} is part of its log's; write one without / and %")
        if not self.command:
            raise UserError("no command: write what runs on every rank after --, such as -- -m recipes.worker RUN.json")
        text = " ".join(self.command)
        if bool(self.seeds) != ("{seed}" in text):
            raise UserError("an array of seeds wants {seed} in the command, and {seed} wants --array SEEDS")


def sbatch_options(cluster: Cluster, job: Job) -> dict[str, str]:
    """sbatch's options by their long names; an empty string has no value."""
    options = {
        "job-name": job.name,
        "account": cluster.account,
        "partition": cluster.partition,
        "time": cluster.time,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "output": f"{cluster.logs}/{job.name}-%{'A_%a' if job.seeds else 'j'}.log",
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
        options["signal"] = f"TERM@{cluster.signal_seconds}"
    if job.seeds:
        options["array"] = ",".join(map(str, job.seeds))
    if job.after is not None:
        options["dependency"] = f"afterok:{job.after}"
        options["kill-on-invalid-dep"] = "yes"  # or it would wait forever for what has failed
    options.update(dict(item.partition("=")[::2] for item in cluster.options))
    return options


def srun_options(cluster: Cluster) -> list[str]:
    """srun's options: the container and its mounts (Pyxis), and that a step ends when one of its tasks does."""
    options = ["--kill-on-bad-exit=1"]
    if cluster.container is not None:
        options += [f"--container-image={cluster.container}", f"--container-workdir={cluster.workdir}"]
        options += [f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else []
    return options


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables of every process: ours on GPUs, how long the ranks may take to save, then the site's.

    torch.distributed.run passes SIGTERM on to its ranks and kills them 30 s later unless it is told how long to wait.
    """
    own = ENVIRONMENT if cluster.gpus else {"PYTHONUNBUFFERED": "1"}
    if cluster.signal_seconds:
        own = own | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(cluster.signal_seconds)}
    return own | cluster.environment


def render(cluster: Cluster, job: Job) -> str:
    """The sbatch script, whole."""
    lines = ["#!/bin/bash", "# Made by launch/slurm.py: change cluster.yaml or the command line, not this file."]
    lines += [
        f"#SBATCH --{name}{f'={shlex.quote(value)}' if value else ''}"
        for name, value in sbatch_options(cluster, job).items()
    ]
    lines += ["", "set -euo pipefail", f"cd {shlex.quote(cluster.workdir)}", *cluster.setup]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment(cluster).items()]
    if not job.ranks:
        one = shlex.join(["srun", *srun_options(cluster), "--nodes=1", "--ntasks=1"])
        return "\n".join([*lines, "", f"exec {one} {_python(cluster, job.command)}"]) + "\n"
    lines += [
        # Not head: it would end scontrol with SIGPIPE, and pipefail the job with it.
        'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"',
        # The name is what the ranks know their own machine by. Where it means nothing to the network, Slurm's address.
        'getent hosts "$MASTER_ADDR" > /dev/null || MASTER_ADDR="$(scontrol show node --oneliner "$MASTER_ADDR" '
        "| sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')\"",
        "export MASTER_ADDR",
        'echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"',
    ]
    srun = " ".join(["srun", *map(shlex.quote, srun_options(cluster))])
    if job.prepare is not None:
        lines += ["", "# Once, before the ranks start.", f"{srun} --nodes=1 --ntasks=1 {_python(cluster, job.prepare)}"]
    torchrun = ["-m", "torch.distributed.run", f"--nnodes={job.nodes}", f"--nproc-per-node={cluster.ranks_per_node}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-id=$SLURM_JOB_ID", f"--rdzv-endpoint=$MASTER_ADDR:{PORT}"]
    lines += ["", "# One launcher per node, one rank per GPU. exec: signals reach it, and its exit code is the job's."]
    lines += [f"exec {srun} {_python(cluster, torchrun)} \\", f"    {_arguments(job.command)}"]
    return "\n".join(lines) + "\n"


def _python(cluster: Cluster, arguments: list[str]) -> str:
    return f"{shlex.quote(cluster.python)} {_arguments(arguments)}"


def _arguments(arguments: list[str]) -> str:
    """Arguments for the shell; Slurm's and our own variables stay variables."""
    return " ".join(_quoted(argument.replace("{seed}", "$SLURM_ARRAY_TASK_ID")) for argument in arguments)


def _quoted(argument: str) -> str:
    if any(name in argument for name in ("$SLURM_", "$MASTER_ADDR")):
        return '"' + argument.replace('"', '\\"') + '"'
    return shlex.quote(argument)


def submit(script: str, logs: Path) -> int:
    """Hands the script to sbatch and returns the job's number; `UserError` with sbatch's words when it refuses."""
    logs.mkdir(parents=True, exist_ok=True)
    return int(_slurm(["sbatch", "--parsable"], script).split(";")[0])


def _slurm(command: list[str], text: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not here: run this where Slurm is, or print the script with --dry-run"
        ) from None
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def status(number: int) -> str:
    """State, nodes and reason of a job that is queued or runs."""
    return _slurm(["squeue", "--noheader", f"--jobs={number}", "--format=%i %T %M of %l on %D nodes %R"])


def queue() -> dict[int, str]:
    """State and reason of all my jobs that are queued or run, by their number."""
    rows = (
        line.split(maxsplit=1) for line in _slurm(["squeue", "--me", "--noheader", "--format=%A %T %R"]).splitlines()
    )
    return {int(number): text for number, text in rows}


def parser() -> argparse.ArgumentParser:
    """Flags of the job; the site is in cluster.yaml."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--cluster", type=Path, default=Path("cluster.yaml"), help="site file (default: cluster.yaml)")
    parse.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parse.add_argument("--name", default="nano3", help="of the job (default: nano3)")
    parse.add_argument("--prepare", help="python arguments, in one string, that run once before")
    parse.add_argument("--array", help="seeds of an array, such as 1,2,3; {seed} in the command is replaced")
    parse.add_argument("--after", type=int, help="job that must have succeeded before")
    parse.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parse.add_argument("action", nargs="?", choices=("submit", "status", "cancel", "follow"), default="submit")
    parse.add_argument("job", nargs="?", type=int, help="number of the job to look at")
    return parse


def main() -> int:
    own = sys.argv[1:]
    place = own.index("--") if "--" in own else len(own)
    args, command = parser().parse_args(own[:place]), own[place + 1 :]
    if args.action != "submit":
        return _look(args)
    cluster = Cluster.load(args.cluster)
    try:
        seeds = tuple(int(seed) for seed in args.array.split(",")) if args.array else ()
    except ValueError:
        raise UserError(f"--array {args.array}: write whole numbers, such as 1,2,3") from None
    prepare = shlex.split(args.prepare) if args.prepare else None
    script = render(cluster, Job(args.name, command, args.nodes, prepare, seeds, args.after))
    if args.dry_run:
        print(script, end="")
    else:
        print(f"submitted job {submit(script, Path(cluster.logs))}; logs in {cluster.logs}")
    return 0


def _look(args: argparse.Namespace) -> int:
    if args.job is None:
        raise UserError(f"{args.action} wants the number of a job, such as: {args.action} 1234")
    if args.action == "cancel":
        _slurm(["scancel", str(args.job)])
        print(f"cancelled {args.job}")
    elif args.action == "status":
        print(status(args.job) or f"job {args.job} is not in the queue")
    else:
        cluster = Cluster.load(args.cluster)
        logs = Path(cluster.logs)
        found = sorted([*logs.glob(f"*-{args.job}.log"), *logs.glob(f"*-{args.job}_*.log")])
        if not found:
            raise UserError(f"no log of job {args.job} in {cluster.logs} yet; see: status {args.job}")
        return subprocess.run(["tail", "--lines=100", "--follow=name", *map(str, found)], check=False).returncode
    return 0


if __name__ == "__main__":
    run(main)
