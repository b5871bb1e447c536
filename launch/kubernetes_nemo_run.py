"""A job as NeMo-Run puts it to Kubernetes: the manifest of a TrainJob (Kubeflow Trainer), printed, not sent.

    python launch/kubernetes_nemo_run.py --cluster cluster.yaml --nodes 2 --name lora --volume CLAIM:/data \\
        -- -m finetune.worker /data/out/run.json | kubectl apply --filename=-

The site is cluster.yaml's: image, interpreter, setup, environment, GPUs of a node; what is Slurm's (account, partition,
time, mounts, options) is not used. --volume names persistent volume claims and where pods see them. What comes before
the ranks (finetune.run_cluster) is to have run already. **Never tried on Kubernetes**; docs/launch.md says what is
lacking there. Imports NeMo-Run, not NeMo.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from nemo_run.core.execution.kubeflow import KubeflowExecutor

from launch.slurm.cluster import Cluster
from launch.slurm.sbatch import Job, environment
from nano3.cli import UserError, run


class _Offline(KubeflowExecutor):
    """The executor without its connection: it wants Kubernetes's package and a cluster before it renders anything."""

    def __post_init__(self) -> None:
        """Connects to nothing."""


def manifest(cluster: Cluster, job: Job, volumes: dict[str, str], namespace: str = "default") -> dict[str, Any]:
    """The TrainJob of a job; `volumes`: persistent volume claim -> path in the pods.

    Kubeflow's torch runtime sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and the like, which torch.distributed.run
    reads in place of flags. Raises `UserError` for what there is no such thing for.
    """
    if cluster.container is None:
        raise UserError("cluster.yaml: pods run an image; name it in `container`, as Docker writes it")
    if job.seeds or job.after is not None:
        raise UserError(
            "Kubernetes has no arrays and no afterok: submit one job for each seed, when the last has ended"
        )
    ranks = [cluster.python, "-m", "torch.distributed.run", *job.command]
    lines = ["set -eo pipefail", f"cd {shlex.quote(cluster.workdir)}", *cluster.setup]
    lines += ["set -u", f"exec {shlex.join(ranks)}"]  # after the site's lines, as in a Slurm script
    made = _Offline(
        namespace=namespace,
        image=cluster.container.replace("#", "/"),
        num_nodes=job.nodes,
        gpus_per_node=cluster.gpus or None,
        nprocs_per_node=cluster.ranks_per_node,
        env_vars=environment(cluster),
        volumes=[{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in volumes],
        volume_mounts=[{"name": claim, "mountPath": path} for claim, path in volumes.items()],
    )
    return made.get_job_body(job.name, ["bash", "-c", "\n".join(lines)])


def main() -> None:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--cluster", type=Path, default=Path("cluster.yaml"), help="site file (default: cluster.yaml)")
    parse.add_argument("--nodes", type=int, default=1, help="pods, one on a machine (default: 1)")
    parse.add_argument("--name", default="nano3", help="of the TrainJob (default: nano3)")
    parse.add_argument("--namespace", default="default", help="(default: default)")
    parse.add_argument("--volume", action="append", default=[], metavar="CLAIM:/PATH", help="may be repeated")
    own = sys.argv[1:]
    place = own.index("--") if "--" in own else len(own)
    args = parse.parse_args(own[:place])
    volumes = dict(item.split(":", 1) for item in args.volume if ":/" in item)
    if len(volumes) != len(args.volume):
        raise UserError("--volume: write CLAIM:/PATH, each claim once")
    job = Job(args.name, own[place + 1 :], args.nodes)
    print(yaml.safe_dump(manifest(Cluster.load(args.cluster), job, volumes, args.namespace), sort_keys=False), end="")


if __name__ == "__main__":
    run(main)
