"""The stages of a pipeline as jobs: handed to Slurm, each after the one before, or printed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.chain import shards
from launch.chain.records import Records
from launch.chain.shards import Shards
from launch.chain.stages import TRAIN, Chain, Stage
from launch.slurm.cluster import ROOT, Cluster
from launch.slurm.job_queue import cancel
from launch.slurm.sbatch import Job, hand_in, render
from nano3.cli import UserError


def job_of(stage: Stage, cluster: Cluster, out: Path, after: int | None) -> tuple[Cluster, Job]:
    """The site and the job of a stage but the training, whose job is the recipe's own."""
    command = ["launch/pipeline.py", "stage", str(out), stage.name]
    job = Job(f"{out.name}-{stage.name}", command, after=after, ranks=False, private=str(out / "job.env"))
    return cluster.for_one_process(stage.gpu), job


def submit_all(
    stages: tuple[Stage, ...], records: Records, cluster: Cluster, site: Path, queued: Mapping[int, str]
) -> None:
    """Hands the stages to Slurm, each after the one before; those among the jobs `queued` stay.

    But not behind a stage that is handed in now: they waited for an older job of it, and can never start.
    """
    alive, before, fresh = dict(queued), None, False
    for stage in stages:
        number = records.job(stage)
        if fresh and number in alive:
            cancel(number)
            print(f"{stage.name:<9} job {number} is cancelled: {alive.pop(number)}")
        if number in alive:
            print(f"{stage.name:<9} job {number} is queued already: {alive[number]}")
        elif stage.name == TRAIN:
            number = _submit_training(stage, site, before)
        else:
            if stage.shards is not None:
                before = submit_shards(stage.shards, records, cluster, queued)
            number = hand_in(*job_of(stage, cluster, records.out, before))
        if number not in alive:
            fresh = True
            records.submitted(stage, number)
            print(f"{stage.name:<9} job {number}" + (f", after {before}" if before else ""), flush=True)
        before = number
    print(f"logs in {cluster.logs}; look with: python launch/pipeline.py status {records.out}")


def submit_shards(array: Shards, records: Records, cluster: Cluster, queued: Mapping[int, str]) -> int | None:
    """Hands in the elements that have shards missing, unless the array is among the jobs `queued`; its number."""
    number = records.shards_job()
    if number is not None and number in queued:
        print(f"{shards.NAME:<9} job {number} is queued already: {queued[number]}")
        return number
    found = array.job(cluster, records.out)
    if found is None:
        print(f"{shards.NAME:<9} all are there")
        return None
    number = hand_in(*found)
    records.submitted_shards(number)
    print(f"{shards.NAME:<9} job {number}, {len(found[1].seeds)} of {array.elements} elements", flush=True)
    return number


def _submit_training(stage: Stage, site: Path, after: int | None) -> int:
    """Has the recipe submit itself; the job's number."""
    command = [sys.executable, *stage.commands[0], "--cluster", str(site)]
    command += ["--after", str(after)] if after is not None else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.search(r"submitted job (\d+)", done.stdout)
    if done.returncode or not found:
        print(done.stderr, file=sys.stderr)
        raise UserError("the training was not submitted, see above; the stages before it stay queued")
    return int(found[1])


def print_scripts(chain: Chain, stages: tuple[Stage, ...], cluster: Cluster, site: Path) -> None:
    """Prints every job's script as if Slurm numbered them from 1."""
    array = stages[0].shards.job(cluster, chain.out) if stages and stages[0].shards else None
    if array is not None:
        print(f"# ---- job 1: {shards.NAME}")
        print(render(*array))
    for number, stage in enumerate(stages, 2 if array is not None else 1):
        after = number - 1 or None
        print(f"# ---- job {number}: {stage.name}")
        if stage.name != TRAIN:
            print(render(*job_of(stage, cluster, chain.out, after)))
            continue
        words = [sys.executable, *stage.commands[0], "--cluster", str(site), "--dry-run"]
        words += ["--after", str(after or 1)]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        print(done.stdout[done.stdout.index("#!/bin/bash") :])
