"""The command line of a sweep: a recipe's own flags and settings, and what to try; begun, resumed, reported."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from finetune import command
from finetune.recipe_file import ROOT, open_recipe, recipe_of, refuse_while_loading
from finetune.run_local import check_data, length_of_run, with_steps
from finetune.settings import Run
from finetune.sweep.report import REPORT, as_lines, best_of, folder_config, write_report
from finetune.sweep.space import SAMPLERS, read_tries
from finetune.sweep.study import KIND, Plan, Study
from finetune.sweep_trials import array_of, check_space, common, run_here, run_on_cluster
from launch.slurm.cluster import Cluster
from launch.slurm.sbatch import render
from nano3.cli import UserError
from nano3.outputs import alone, claim

PATIENCE_S = 10
"""The trials of a sweep that was killed hold its lock until they have ended."""
NOT_OF_A_SWEEP = ("eval_only", "adapter", "after", "array", "overwrite", "help_settings")
"""Flags of a recipe that a sweep does not take."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of a recipe, and those of a sweep."""
    parse = command.parser(description)
    sweep = parse.add_argument_group("sweep")
    sweep.add_argument(
        "--recipe", type=Path, default=ROOT / "recipes" / "nemotron_lora.py", metavar="FILE.py",
        help="recipe of every trial (default: recipes/nemotron_lora.py)",
    )  # fmt: skip
    sweep.add_argument(
        "--try", dest="tries", action="append", default=[], metavar="KEY=...",
        help="a setting with choices, 8,16,32 (or a|b), or a range, 1e-5..1e-3:log; repeatable",
    )  # fmt: skip
    sweep.add_argument("--trials", type=int, default=8, metavar="N", help="results in all (default: 8)")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time (default: 1)")
    sweep.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="how points are chosen (default: tpe)")
    sweep.add_argument("--seed", type=int, default=0, help="of the choice of points; train.seed is the runs'")
    sweep.add_argument(
        "--prune-after", type=int, metavar="STEPS",
        help="from this step on, end trials whose validation loss is worse than the median (default: end none)",
    )  # fmt: skip
    sweep.add_argument("--give-up", type=int, metavar="TRIAL", help="record a trial that cannot end as failed")
    return parse


def main(description: str | None) -> int:
    """A sweep's command line; the exit code. The same command resumes a sweep, and with more --trials extends it."""
    refuse_while_loading()
    args = parser(description).parse_intermixed_args()
    _check(args)
    run, site = _run_of(args)
    if args.dry_run:
        return _show(args, run, site)
    out = claim(run.out, KIND)
    refusal = f"another process runs the sweep in {out}; wait for it, or choose another --out"
    with alone(out, refusal, PATIENCE_S):
        study = Study.begin(out, _plan(args, run))
        check_space(run, study)
        if args.give_up is not None:
            _give_up(study, args.give_up)
        try:
            if site is None:
                code = run_here(run, study, args.trials, args.jobs)
            else:
                code = run_on_cluster(run, study, args.trials, args.jobs, site, args.follow)
        finally:
            _report(args, study)
    left = len(study.unfinished())
    if code or left:
        print(f"{left} trials have no result yet; the same command resumes the sweep", file=sys.stderr)
    return code


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for flags that mean nothing here, or numbers that cannot be."""
    for name in NOT_OF_A_SWEEP:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} is of one run; leave it out of a sweep")
    if not args.tries:
        raise UserError("nothing to try: give --try lora.rank=8,16,32, or --try train.lr=1e-5..1e-3:log")
    for name, least in (("trials", 1), ("jobs", 1), ("seed", 0), ("prune_after", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def _run_of(args: argparse.Namespace) -> tuple[Run, Cluster | None]:
    """What all trials have in common, its length known, and the cluster they go to, None for this machine."""
    defaults, recipe = open_recipe(args.recipe)
    args.out = args.out or Path("runs/sweep")
    args = command.filled(args)
    run, arch = command.resolve(args, defaults, recipe_of(recipe))
    if run.validation is None:
        raise UserError("a sweep compares validation losses; give --validation STORE")
    if args.prune_after is not None and not run.settings.train.validate_every:
        raise UserError("--prune-after looks at validations on the way; give train.validate_every=STEPS too")
    if args.site is not None and run.own_base:
        raise UserError(
            "on a cluster all trials share one base; make it with conversion/hf_to_nemo.py and give --base FOLDER"
        )
    check_data(run, arch, contents=False)
    if run.settings.train.steps is None and not any(word.startswith("train.epochs=") for word in args.tries):
        run = with_steps(run, length_of_run(run))
    return run, args.site


def _plan(args: argparse.Namespace, run: Run) -> Plan:
    return Plan(read_tries(args.tries), args.sampler, args.seed, args.prune_after, common(run))


def _show(args: argparse.Namespace, run: Run, site: Cluster | None) -> int:
    """What would be tried, and the script of the first array."""
    study = Study(Path(run.out), _plan(args, run))
    check_space(run, study)
    for key, one in study.space.items():
        print(f"{key:<24} {one}")
    print(f"{args.trials} trials, {args.jobs} at a time, in {run.out}")
    if site is not None:
        print(render(site, array_of(run, tuple(range(min(args.jobs, args.trials))))), end="")
    return 0


def _give_up(study: Study, number: int) -> None:
    if number not in study.unfinished():
        raise UserError(f"--give-up {number}: that trial is not one without a result ({study.unfinished()})")
    study.fail(number)


def _report(args: argparse.Namespace, study: Study) -> None:
    """Prints the table, and how the best trial runs alone; writes the report."""
    if not study.trials():
        return
    flags = [f"--{name}={value}" for name in ("gpus_per_node", "ranks") if (value := getattr(args, name))]
    words = ["python", str(args.recipe), *(["--local"] if args.local else []), *flags]
    lines = write_report(study, shlex.join([*words, "--config", "OUT/trials/N/config.yaml", "--out", "FOLDER"]))
    print(f"\n{as_lines(lines)}\n{study.folder / REPORT}")
    if best := best_of(lines):
        print(f"the best alone: {shlex.join([*words, '--config', str(folder_config(best)), '--out', 'FOLDER'])}")
