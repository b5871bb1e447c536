"""Large data prepared by a Slurm array: each element writes its shards, and the stage `prepare` joins them.

    shards    --array=1-4%2   data_prep/prepare.py ... --shard I/4      as many at once as the throttle lets
    prepare   afterok         data_prep/prepare.py ... --join

Element I of N writes the shards I, I + N, I + 2N, ...: so any number of elements does for any number of shards, and an
array that Slurm would not take (MaxArraySize) becomes a shorter one. Nobody drives it and nothing is remembered of an
element: a shard whose marker is there is finished. A failed element is requeued by its own job, twice; when the
pipeline is given again, only elements that have shards missing are handed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launch.slurm.cluster import Cluster
from launch.slurm.job_queue import largest_array
from launch.slurm.sbatch import Job
from launch.slurm.shell import SEED
from nano3.cli import UserError
from nano3.store_parts import finished_parts, shards_of
from nano3.token_store import unfinished_folder

NAME = "shards"
RETRIES = 2
"""Of an element that dies; one that meets a user's mistake ends at once."""


@dataclass(frozen=True)
class Shards:
    """An array that prepares the parts of one store. Raises `UserError` for numbers below what they can be."""

    command: tuple[str, ...]
    """Python's arguments that prepare the store in one process."""
    store: Path
    elements: int
    at_once: int = 0
    """Most elements that run at the same time; 0 leaves it to Slurm."""

    def __post_init__(self) -> None:
        if self.elements < 1 or self.at_once < 0:
            raise UserError(
                f"--shards {self.elements} must be at least 1, and --shards-at-once {self.at_once} 0 or more"
            )

    def fitted(self) -> Shards:
        """The same in at most as many elements as an array of this Slurm may have, with more shards in each."""
        return replace(self, elements=min(self.elements, largest_array()))

    def missing(self) -> tuple[int, ...]:
        """Elements, from 1, that have a shard to write, or may have one: nobody knows before the last is there."""
        folder = unfinished_folder(self.store)
        shards = shards_of(folder)
        if shards is None:
            return tuple(range(1, self.elements + 1))
        lacking = set(range(shards)) - set(finished_parts(folder))
        return tuple(sorted({shard % self.elements + 1 for shard in lacking}))

    def job(self, cluster: Cluster, out: Path) -> tuple[Cluster, Job] | None:
        """The site and the array that writes what is missing, for the pipeline in `out`; None where all is there."""
        elements = self.missing()
        if not elements:
            return None
        command = [*self.command, "--shard", f"{SEED}/{self.elements}"]
        job = Job(
            f"{out.name}-{NAME}", command, seeds=elements, at_once=self.at_once, retries=RETRIES, ranks=False,
            private=str(out / "job.env"),
        )  # fmt: skip
        return cluster.for_one_process(False), job


def describe(store: Path, job: int, alive: Mapping[int, str]) -> str:
    """How the array `job` stands, for people; `alive` are the jobs in the queue."""
    folder = unfinished_folder(store)
    if not folder.is_dir() and job not in alive:
        return f"job {job} ended; its parts are joined or gone"
    shards = shards_of(folder)
    there = f"{len(finished_parts(folder))} of {shards or '?'} shards are there"
    return f"job {job} {alive.get(job, 'ended')}; {there}"
