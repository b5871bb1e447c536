"""Slurm: one description of a job, rendered as a plain sbatch script or, for NeMo-Run, as its executor.

    python launch/slurm/sbatch.py --cluster cluster.yaml --nodes 2 --dry-run -- -m finetune.worker OUT/run.json
    python launch/slurm/sbatch.py --cluster cluster.yaml status 1234        # or cancel 1234, follow 1234

What is after `--` runs on every GPU under torchrun, one launcher per node; what `--prepare` names runs first, once.
`launch/slurm_nemo_run.py` makes a NeMo-Run executor from the same two objects. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.cluster import Cluster
from launch.slurm.job_queue import cancel, follow, status, submit
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

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes} must be at least 1")
        if not self.name.isprintable() or not self.name or set("/%") & set(self.name):
            raise UserError(f"the job's name {self.name!r} is part of its log's; write one without / and %")
        if not self.command:
            raise UserError(
                "no command: write what runs on every rank after --, such as -- -m finetune.worker RUN.json"
            )
        text = " ".join([*self.command, *(self.prepare or []), self.out or ""])
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
        # B: to the script, which passes it on and has the job requeued; without, to the processes only.
        options["signal"] = f"{'B:' if job.out else ''}TERM@{cluster.signal_seconds}"
    if job.seeds:
        options["array"] = ",".join(map(str, job.seeds))
    if job.after is not None:
        options["dependency"] = f"afterok:{job.after}"
        options["kill-on-invalid-dep"] = "yes"  # or it would wait forever for what has failed
    options.update(dict(item.partition("=")[::2] for item in cluster.options))
    return options


def srun_options(cluster: Cluster) -> list[str]:
    """srun's options: the container and its mounts (Pyxis), that a step ends when one of its tasks does, and that the
    ranks of a launcher share the cores of their node."""
    options = ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    if cluster.cpus_per_task:  # which a step does not have from its job, since Slurm 22.05
        options.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.container is not None:
        options += [f"--container-image={cluster.container}", f"--container-workdir={cluster.workdir}"]
        options += [f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else []
    return options


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables of every process: ours on GPUs, how long the ranks may take to save, then the site's.

    torch.distributed.run passes SIGTERM on to its ranks and kills them 30 s later unless it is told how long to wait:
    three quarters of the time before Slurm ends the job, which leaves the script some to have it requeued.
    """
    own = ENVIRONMENT if cluster.gpus else {"PYTHONUNBUFFERED": "1"}
    if cluster.signal_seconds:
        own = own | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, cluster.signal_seconds * 3 // 4))}
    return own | cluster.environment


def render(cluster: Cluster, job: Job) -> str:
    """The sbatch script, whole."""
    lines = ["#!/bin/bash", "# Made by launch/slurm/sbatch.py: change cluster.yaml or the command line, not this file."]
    lines += [
        f"#SBATCH --{name}{f'={shlex.quote(value)}' if value else ''}"
        for name, value in sbatch_options(cluster, job).items()
    ]
    # -u after the site's lines: conda's and modules' own scripts read variables that are not set.
    lines += ["", "set -eo pipefail", f"cd {shlex.quote(cluster.workdir)}", *cluster.setup, "set -u"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment(cluster).items()]
    srun = shlex.join(["srun", *srun_options(cluster)])
    if not job.ranks:
        return "\n".join([*lines, "", f"exec {srun} --nodes=1 --ntasks=1 {_python(cluster, job.command)}"]) + "\n"
    lines += _RENDEZVOUS
    if job.out is not None:
        lines += ["", "# What befalls the job, it survives: launch/slurm/survive.sh says how."]
        # One job of an array has the array's own number, which means all of them. Not for the shell to find out: a job
        # that is submitted from within an array's has these variables too.
        name = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.seeds else "$SLURM_JOB_ID"
        lines += [f"OUT={_arguments([job.out])}", f'JOB="{name}"', "source launch/slurm/survive.sh"]
    if job.prepare is not None:
        lines += ["", "# Once, before the ranks start."]
        before = "survive " if job.out is not None else ""
        lines += [f"{before}{srun} --nodes=1 --ntasks=1 {_python(cluster, job.prepare)}"]
    torchrun = ["-m", "torch.distributed.run", f"--nnodes={job.nodes}", f"--nproc-per-node={cluster.ranks_per_node}"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-id=$SLURM_JOB_ID", f"--rdzv-endpoint=$MASTER_ADDR:{PORT}"]
    # exec: signals reach srun, and its exit code is the job's.
    start, end = ("survive ", ["finished"]) if job.out is not None else ("exec ", [])
    lines += ["", f"# One launcher per node, {'one rank per GPU' if cluster.gpus else 'which starts its ranks'}."]
    lines += [f"{start}{srun} {_python(cluster, torchrun)} \\", f"    {_arguments(job.command)}", *end]
    return "\n".join(lines) + "\n"


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
    return f"{shlex.quote(cluster.python)} {_arguments(arguments)}"


def _arguments(arguments: list[str]) -> str:
    """Arguments for the shell; Slurm's and our own variables stay variables."""
    return " ".join(_quoted(argument.replace("{seed}", "$SLURM_ARRAY_TASK_ID")) for argument in arguments)


def _quoted(argument: str) -> str:
    if any(name in argument for name in ("$SLURM_", "$MASTER_ADDR")):
        return '"' + argument.replace('"', '\\"') + '"'
    return shlex.quote(argument)


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
    parse.add_argument("--survive", metavar="OUT", help="the run in OUT goes on when it is started again: requeue it")
    parse.add_argument("--after", type=int, help="job that must have succeeded before")
    parse.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parse.add_argument("action", nargs="?", choices=("submit", "status", "cancel", "follow"), default="submit")
    parse.add_argument("job", nargs="?", type=int, help="number of the job to look at")
    return parse


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds in `1,2,3`, all different; `UserError` otherwise."""
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise UserError(f"--array {text}: write whole numbers, such as 1,2,3") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--array {text}: seeds must be different, and at least 0")
    return seeds


def main() -> int:
    own = sys.argv[1:]
    place = own.index("--") if "--" in own else len(own)
    args, command = parser().parse_args(own[:place]), own[place + 1 :]
    if args.action != "submit":
        return _look(args)
    cluster = Cluster.load(args.cluster)
    seeds = read_seeds(args.array) if args.array else ()
    prepare = shlex.split(args.prepare) if args.prepare else None
    script = render(cluster, Job(args.name, command, args.nodes, prepare, seeds, args.after, args.survive))
    if args.dry_run:
        print(script, end="")
    else:
        print(f"submitted job {submit(script, Path(cluster.logs))}; logs in {cluster.logs}")
    return 0


def _look(args: argparse.Namespace) -> int:
    if args.job is None:
        raise UserError(f"{args.action} wants the number of a job, such as: {args.action} 1234")
    if args.action == "follow":
        return follow(args.job, Path(Cluster.load(args.cluster).logs))
    if args.action == "cancel":
        cancel(args.job)
        print(f"cancelled {args.job}")
    else:
        print(status(args.job) or f"job {args.job} is not in the queue")
    return 0


if __name__ == "__main__":
    run(main)
