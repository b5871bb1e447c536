"""A run on a Slurm cluster: looked at, written to OUT, submitted; and the job's first step.

`submit` is what a recipe does with `--nodes N`. `python -m finetune.run_cluster OUT/run.json` is what the job does
once before its ranks start: the base weights are imported unless they are there, half-written checkpoints removed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from finetune.checks import plan_of
from finetune.run_local import (
    KIND,
    check_data,
    import_base,
    last_checkpoint,
    length_of_run,
    refuse_finished,
    with_steps,
    write_run,
    write_settings,
)
from finetune.settings import Run
from launch.plan.hardware import find_gpu
from launch.plan.mounts import parse_mount
from launch.plan.preflight_checks import Paths
from launch.preflight import Request, report, report_cpu
from launch.slurm.bundle import refuse_stale
from launch.slurm.cluster import CPU, EXAMPLE, Cluster
from launch.slurm.job_queue import follow, status
from launch.slurm.sbatch import Job, hand_in, private_note, render
from launch.slurm.shell import write_private
from nano3.arch import Arch
from nano3.checkpoints.checkpoint_folder import clear_unfinished, newest
from nano3.cli import UserError, run
from nano3.outputs import claim, fresh_file

JOB = "job"
"""In OUT: the number of the one job that may write there, `12` or `12_SEED`; launch/slurm/survive.sh sees to that."""


def seed_folder(run: Run, seed: int | str) -> str:
    """Where the run of one seed of an array lies."""
    return str(Path(run.out) / f"seed-{seed}")


def of_seed(run: Run, seed: int) -> Run:
    """The run of one seed of an array: in a folder of its own, with a base of its own unless that is given."""
    out = seed_folder(run, seed)
    settings = replace(run.settings, train=replace(run.settings.train, seed=seed))
    return replace(run, out=out, base=str(Path(out) / "base") if run.own_base else run.base, settings=settings)


def job_of(run: Run, after: int | None = None, seeds: tuple[int, ...] = (), each: str | None = None) -> Job:
    """The job of a run, or an array of one for each of the seeds: its first step and its ranks, once the job `after`
    has succeeded. `each` is the folder of the run of one `{seed}`, by default OUT/seed-N."""
    out = each or seed_folder(run, "{seed}") if seeds else run.out
    written = str(Path(out) / "run.json")
    return Job(
        name=Path(run.out).name,
        command=["-m", "finetune.worker", written],
        nodes=run.nodes,
        prepare=["-m", "finetune.run_cluster", written],
        seeds=seeds,
        after=after,
        out=out,
        private=str(Path(run.out) / "job.env"),
    )


def preflight(run: Run, cluster: Cluster, after: int | None = None, runs: int = 1) -> tuple[int, str]:
    """(exit code, what to print), see `launch.preflight.report`, for so many runs of an array, or one.

    Behind another job, `after`, neither the data nor the base is looked at: that job may make them anew, whatever lies
    there now. The run's own job looks at them before it starts its ranks.
    """
    read = {
        "--model": run.model,
        "--base": "" if run.own_base else run.base,
        "lora.init_from": run.settings.lora.init_from,
    }
    paths = Paths(
        model=Path(run.model) if run.own_base or after is not None else Path(run.base),
        data=Path(run.data) if run.data and after is None else None,
        validation=Path(run.validation) if run.validation else None,
        out=Path(run.out),
        mounts=tuple(map(parse_mount, cluster.mounts)) if cluster.container is not None else None,
        imported=not run.own_base,
        also={what: Path(path) for what, path in read.items() if path},
        runs=runs,
    )
    arch, plan = Arch.load(run.model), plan_of(run.settings)
    if cluster.hardware == CPU:
        return report_cpu(plan, arch, paths, run.nodes)
    return report(Request(find_gpu(cluster.hardware), run.nodes, run.ranks_per_node, arch, plan, paths), files=True)


def site_of(file: Path, nodes: int, per_node: int | None, example: bool = False) -> Cluster:
    """The site in `file`; where there is none and `example`, the shipped example with its blanks.

    Raises:
        UserError: it cannot be used, its nodes have not `per_node` ranks, or its bundle is of another state.
    """
    if not file.is_file() and not example:
        raise UserError(
            f"--nodes {nodes} needs a cluster, which {file} would describe: copy {EXAMPLE} there and fill in "
            "account and partition; or see what would run with --dry-run"
        )
    if not file.is_file():
        shown = Cluster.example()
        return shown if per_node is None else replace(shown, gpus_per_node=per_node)
    cluster = Cluster.load(file)
    if per_node not in (None, cluster.ranks_per_node):
        raise UserError(f"--gpus-per-node {per_node}, but {file} has gpus_per_node: {cluster.gpus_per_node}")
    if cluster.bundle:
        refuse_stale(Path(cluster.bundle))
    return cluster


def check_progress(minutes: float, cluster: Cluster) -> None:
    """Raises `UserError` unless every job is sure to write a checkpoint, one in `minutes`, before its time is over."""
    if minutes <= 0:
        raise UserError(
            f"checkpoint.minutes={minutes:g}: on a cluster a job may be gone at any step; write one every 15 minutes"
        )
    if cluster.seconds is not None and 60 * minutes > cluster.seconds - cluster.signal_seconds:
        most = (cluster.seconds - cluster.signal_seconds) / 60
        raise UserError(
            f"checkpoint.minutes={minutes:g}, but a job ends after time: {cluster.time}, less signal_seconds: "
            f"{cluster.signal_seconds}: it might never get further. Give at most {most:g}, or a longer time"
        )


def refuse_second_job(out: Path) -> None:
    """Raises `UserError` while a job that was submitted for the folder `out` is queued or runs."""
    try:
        number = (out / JOB).read_text().strip()
    except OSError:
        return
    if re.fullmatch(r"\d+(_\d+)?", number) and (state := status(number)):
        raise UserError(
            f"job {number} writes to {out} or waits to: {state}. Wait for it, end it with scancel {number}, or choose "
            "another --out"
        )


def make_ready(out: Path) -> None:
    """The folder `out`, made a run's; `UserError` for a finished run, another job's, or a damaged checkpoint in it."""
    claim(out, KIND)
    refuse_finished(out)
    refuse_second_job(out)
    newest(out)  # a damaged checkpoint is refused before the queue; one of another run before the ranks start


def submit(
    run: Run,
    cluster: Cluster,
    dry_run: bool,
    after: int | None = None,
    watch: bool = False,
    seeds: tuple[int, ...] = (),
) -> int:
    """Prints the preflight and the script (`dry_run`), or writes OUT/run.json and submits; the exit code.

    With `seeds` it is an array of runs, in OUT/seed-N.

    The job waits for the job `after`, which makes the data or the base: the job's first step looks at them then.
    `watch` shows its log until it ends, and returns 1 if it did not complete.

    Raises:
        UserError: a finished run in OUT, another job for it, too few checkpoints, or Slurm's refusal.
    """
    out, job = Path(run.out), job_of(run, after, seeds)
    script = render(cluster, job)
    check_progress(run.settings.checkpoint.minutes, cluster)
    code, text = preflight(run, cluster, after, len(seeds) or 1)
    print(text, file=sys.stderr)
    if cluster.blanks():
        print(f"no cluster.yaml: the script is that of {EXAMPLE}, with FILL IN where you must", file=sys.stderr)
    if note := private_note(cluster, job):
        print(note, file=sys.stderr)
    if dry_run:
        print(script, end="")
        return code
    if code:
        return code
    # What the job `after` makes anew may lie there already, of another time: the job's first step derives the steps.
    if after is None and run.data:
        run = with_steps(run, length_of_run(run))
    make_ready(out)
    number = hand_in_runs(cluster, job, out, {seed: of_seed(run, seed) for seed in seeds} or {None: run})
    return follow(number, Path(cluster.logs)) if watch else 0


def hand_in_runs(cluster: Cluster, job: Job, out: Path, runs: Mapping[int, Run] | Mapping[None, Run]) -> int:
    """Writes the runs of a job, by their number in its array, each into its folder, and submits it; its number. The
    script goes to `out`."""
    for one in runs.values():
        make_ready(Path(one.out))
    for one in runs.values():
        write_run(one)
    write_private(out / "job.sbatch", render(cluster, job))
    number = hand_in(cluster, job)
    for element, one in runs.items():
        with fresh_file(Path(one.out) / JOB) as temporary:
            temporary.write_text(f"{number}\n" if element is None else f"{number}_{element}\n")
    print(f"submitted job {number}; logs in {cluster.logs}", flush=True)
    return number


def main() -> int:
    """0, or 1 for what a file system refuses: 2 is a user's mistake to the job, which is not tried again."""
    try:
        first_step(Run.from_json(Path(sys.argv[1]).read_text()))
    except OSError as error:  # such as a node's stale mount; another node may read it
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def first_step(run: Run) -> None:
    """What the job does once; `UserError` for what does not fit the run."""
    refuse_finished(Path(run.out))
    clear_unfinished(Path(run.out))
    check_data(run, Arch.load(run.model))  # what an earlier job of a chain has made was not there to be looked at
    length = length_of_run(run)
    print("\n".join(length.describe()), flush=True)
    if run.settings.train.steps is None:
        run = with_steps(run, length)
        write_settings(run)
    import_base(run)
    last_checkpoint(run)  # now, on one machine, and not when every rank waits for the one that reads it


if __name__ == "__main__":
    run(main)
