"""NeMo-Run's Slurm executor from what `launch/slurm/sbatch.py` renders. Imports NeMo-Run, not NeMo."""

from __future__ import annotations

from dataclasses import replace

import nemo_run as run

from launch.slurm.cluster import Cluster
from launch.slurm.sbatch import Job, environment, sbatch_options, srun_options

_OWN = {"job-name", "account", "partition", "time", "nodes", "ntasks-per-node", "output", "open-mode", "gres", "array"}
_OWN |= {"exclusive", "signal", "cpus-per-task", "dependency", "kill-on-invalid-dep"}
"""Options that the executor has fields for."""


def executor(cluster: Cluster, job: Job) -> run.SlurmExecutor:
    """The executor of a job: torchrun with one launcher per node, as the rendered script has it.

    NeMo-Run writes its own script; options, container, mounts, environment and setup are those of `render`. It names
    logs itself, and dependencies are NeMo-Run's own (an experiment's).
    """
    options = sbatch_options(cluster, replace(job, out=None))  # its script does not pass signals on: Slurm must
    return run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        time=cluster.time,
        nodes=job.nodes,
        ntasks_per_node=cluster.ranks_per_node,
        gres=options.get("gres"),
        cpus_per_task=cluster.cpus_per_task or None,
        exclusive=cluster.exclusive or None,
        signal=options.get("signal"),
        array=options.get("array"),
        container_image=cluster.container,
        container_mounts=list(cluster.mounts),
        additional_parameters={name: value for name, value in options.items() if name not in _OWN and value},
        srun_args=[option for option in srun_options(cluster) if not option.startswith("--container")],
        env_vars=environment(cluster),
        setup_lines="\n".join(cluster.setup) or None,
        launcher="torchrun",
    )
