"""Any command as a Slurm job of your site, and a look at jobs.

    python launch/slurm.py --cluster cluster.yaml --nodes 2 --dry-run -- -m finetune.worker OUT/run.json
    python launch/slurm.py --cluster cluster.yaml status 1234        # or cancel 1234, follow 1234

What is after `--` runs on every GPU under torchrun, one launcher per node; what `--prepare` names runs first, once.
The script is made by launch/slurm/sbatch.py. Nothing imports this file: `launch.slurm` is the package beside it.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import shlex
import sys
from pathlib import Path

from launch.slurm.cluster import Cluster
from launch.slurm.job_queue import cancel, follow, status
from launch.slurm.sbatch import Job, hand_in, private_note, read_seeds, render


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
    parse.add_argument("--survive", metavar="OUT", help="the run in OUT resumes when it is started again: requeue it")
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
    seeds = read_seeds(args.array) if args.array else ()
    prepare = shlex.split(args.prepare) if args.prepare else None
    private = str(Path(cluster.logs).resolve() / f"{args.name}.env")
    job = Job(args.name, command, args.nodes, prepare, seeds, args.after, args.survive, private=private)
    if args.dry_run:
        print(render(cluster, job), end="")
        if note := private_note(cluster, job):
            print(note, file=sys.stderr)
    else:
        print(f"submitted job {hand_in(cluster, job)}; logs in {cluster.logs}")
    return 0


def _look(args: argparse.Namespace) -> int:
    if args.job is None:
        raise UserError(f"{args.action} requires the number of a job, such as: {args.action} 1234")
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
