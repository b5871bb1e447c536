"""A sweep's trials as runs: what each of them is, started side by side on this machine or as an array of Slurm.

A trial is a run like any other, in a folder of its own, with its own checkpoints. Whoever comes back to a sweep looks
into the folders: a trial that has its adapter is finished, and one that has not goes on from where it is.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from finetune import command, run_cluster
from finetune.checks import check_run
from finetune.run_identity import MAY_CHANGE
from finetune.run_local import import_base
from finetune.settings import Run
from finetune.sweep.space import as_text, ends, words_of
from finetune.sweep.study import TRIALS, Study
from launch.local import die_with_parent, log_file
from launch.slurm.cluster import Cluster
from launch.slurm.job_queue import follow
from launch.slurm.sbatch import Job
from nano3 import cli
from nano3.arch import Arch
from nano3.cli import UserError
from nano3.overrides import apply_overrides, flatten
from nano3.training.divergence import DIVERGED
from nano3.training.journal import FILE, read_rows

Running = dict[int, "tuple[int, multiprocessing.process.BaseProcess]"]
"""Trial -> its place among those beside it, and its process."""


def common(run: Run) -> dict[str, Any]:
    """What all trials of a sweep share, for `Plan.common`: the settings that have a say in the numbers, and paths."""
    recipe = {f"recipe {name}": digest for name, digest in run.recipe.sha256.items()} if run.recipe else {}
    paths = {"model": run.model, "data": run.data, "validation": run.validation}
    settings = {key: value for key, value in flatten(run.settings).items() if not key.startswith(MAY_CHANGE)}
    return {**paths, **recipe, **settings}


def check_space(run: Run, study: Study) -> None:
    """Raises `UserError` unless every choice and both ends of every range make a run, each by itself."""
    for key in study.plan.tries:
        if key.startswith(MAY_CHANGE) or key == "lora.init_from":
            raise UserError(f"--try {key}: it has no say in the numbers of a run, or belongs to all; leave it out")
    for point in ends(study.space):
        trial_run(run, study, 0, point)


def trial_run(run: Run, study: Study, number: int, params: Mapping[str, Any]) -> Run:
    """The run of a trial: `run` with the trial's settings, in the trial's folder, on the base of the whole sweep.

    Raises:
        UserError: settings with which no run could be right.
    """
    settings, words = copy.deepcopy(run.settings), [f"{key}={as_text(value)}" for key, value in params.items()]
    out = str(study.folder_of(number))
    base = str(Path(out) / "base") if run.own_base and run.nf4 else run.base  # a record of hashes, that each has itself
    try:
        apply_overrides(settings, words)
        one = replace(run, settings=settings, out=out, base=base, trial=number)
        check_run(one, Arch.load(run.model))
    except UserError as error:
        raise UserError(f"a trial with {words_of(params)}: {error}") from None
    return one


def result_of(folder: Path) -> float | None:
    """The validation loss of the adapter that a trial's run ended with; None while it has not ended."""
    if not (folder / "adapter" / "lora.json").is_file():
        return None
    losses = [row["validation_loss"] for row in read_rows(folder / FILE) if "validation_loss" in row]
    if not losses or not isinstance(losses[-1], float):
        raise UserError(f"{folder / FILE} has no validation_loss; the trial's recipe must validate")
    return losses[-1]


def settle(study: Study) -> list[int]:
    """Records what the folders say of trials without a result; the numbers of those that are still to be run."""
    left = []
    for number in study.unfinished():
        folder = study.folder_of(number)
        if (loss := result_of(folder)) is not None:
            study.finish(number, loss)
        elif _diverged(folder):
            study.fail(number)
        else:
            left.append(number)
    return left


def _diverged(folder: Path) -> bool:
    """Whether a run ended because its loss ran away, which no second attempt would change."""
    log = log_file(folder / "logs", 0)
    return log.is_file() and DIVERGED in log.read_text(errors="replace")


def run_here(run: Run, study: Study, trials: int, jobs: int) -> int:
    """Runs what is left of so many `trials` on this machine, `jobs` at a time.

    Returns 0, or the exit code of a trial that ended without a result. Then, as after a kill, the same call goes on.
    """
    places = _places(run, jobs)
    import_base(run)
    left, running, code = settle(study), Running(), 0
    with _ended(running):
        while not code:
            while len(running) < jobs and (number := _next(study, left, trials)) is not None:
                one = trial_run(run, study, number, study.trials()[number].params)
                place = min(places - {where for where, _ in running.values()})
                print(f"== trial {number} of {trials}: {words_of(study.trials()[number].params)}", flush=True)
                running[number] = place, _start(one, place, jobs > 1)
            if not running:
                return 0
            wait([process.sentinel for _, process in running.values()])
            for number in [number for number, (_, process) in running.items() if process.exitcode is not None]:
                ended = running.pop(number)[1].exitcode or 0
                if number in settle(study):
                    print(f"trial {number} ended without a result, exit code {ended}", file=sys.stderr)
                    code = code or (128 - ended if ended < 0 else ended) or 1
    return code


def _places(run: Run, jobs: int) -> set[int]:
    """Where trials run beside each other: on GPUs each on its own. Raises `UserError` for too few of them."""
    gpus, needed = len(list(Path("/dev").glob("nvidia[0-9]*"))), jobs * run.ranks_per_node
    if not run.cpu and gpus < needed:
        raise UserError(
            f"{jobs} trials at a time require {needed} NVIDIA GPUs and this machine has {gpus}; give fewer --jobs, or "
            "--gpus-per-node, or add --local to run on CPU ranks"
        )
    return set(range(jobs))


def _next(study: Study, left: list[int], trials: int) -> int | None:
    """The next trial: one that was begun and has no result, or a new one, of so many in all."""
    if left:
        return left.pop(0)
    return study.propose() if len(study.trials()) < trials else None


def _start(run: Run, place: int, quiet: bool) -> multiprocessing.process.BaseProcess:
    """A process that runs a trial, and ends with this one. `quiet`: what it says goes to OUT/trials/N.log."""
    Path(run.out).parent.mkdir(exist_ok=True)
    sys.stdout.flush()
    process = multiprocessing.get_context("fork").Process(target=_trial, args=(run, place, quiet))
    process.start()
    return process


def _trial(run: Run, place: int, quiet: bool) -> None:
    die_with_parent()
    if not run.cpu:
        first = place * run.ranks_per_node
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + run.ranks_per_node)))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if quiet:
        log = Path(run.out).with_suffix(".log").open("a")  # beside its folder, which the run makes
        sys.stdout = sys.stderr = log
    cli.run(lambda: command.train(run, Arch.load(run.model)))


@contextmanager
def _ended(running: Running) -> Iterator[None]:
    """While trials run: SIGTERM and errors end them, each with a checkpoint; Ctrl-C has reached them itself."""

    def terminated(_number: int, _frame: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt:
        for _, process in running.values():
            process.join()
        raise
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
        signal.signal(signal.SIGTERM, before)


def run_on_cluster(run: Run, study: Study, trials: int, jobs: int, site: Cluster, watch: bool) -> int:
    """Submits what is left of so many `trials`, at most `jobs` of them as one array; with `watch` until all are done.

    Without `watch` the same command, given again when the array has ended, records its results and submits the next:
    later trials are proposed from what earlier ones gave.
    """
    while True:
        left = settle(study)
        for number in left:
            run_cluster.refuse_second_job(study.folder_of(number))
        while len(left) < jobs and len(study.trials()) < trials:
            left.append(study.propose())
        if not left:
            return 0
        runs = {number: trial_run(run, study, number, study.trials()[number].params) for number in left[:jobs]}
        if code := _preflight(runs, site):
            return code
        number = run_cluster.hand_in_runs(site, array_of(run, tuple(runs)), Path(run.out), runs)
        if not watch:
            print("when it has ended, the same command records the results and submits what is left", flush=True)
            return 0
        code = follow(number, Path(site.logs))
        if code or set(settle(study)) & set(runs):  # trials that have no result would be submitted for ever
            return code or 1


def _preflight(runs: Mapping[int, Run], site: Cluster) -> int:
    """What preflight says of the first run, or of one that it refuses; the exit code."""
    for place, one in enumerate(runs.values()):
        run_cluster.check_progress(one.settings.checkpoint.minutes, site)
        code, text = run_cluster.preflight(one, site, runs=len(runs))
        if code or not place:
            print(text, file=sys.stderr)
        if code:
            return code
    return 0


def array_of(run: Run, numbers: tuple[int, ...]) -> Job:
    """The array of so many trials."""
    return run_cluster.job_of(run, seeds=numbers, each=str(Path(run.out) / TRIALS / "{seed}"))
