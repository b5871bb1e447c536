"""From questions to a merged model and its FP8 checkpoint, both scored beside the base; here or on Slurm.

    python launch/pipeline.py run --model FOLDER --input TRAIN.jsonl --questions HELD.jsonl --out OUT --nodes 2
    python launch/pipeline.py run --model pico ... --out OUT --local --ranks 2 layout.ep=2 train.steps=200
    python launch/pipeline.py status OUT

The stages are prepare, import, train, merge, quantize, evaluate.
A dense model of the family has no quantize: no FP8 selection of it is known. With lora.base=nf4 there is no import: the
ranks read FOLDER, and `--with merge="--base dequantized"` merges onto the weights that they saw.
On Slurm every stage is a job that waits for the one before (afterok), on CPU nodes where no GPU is needed; the site is
in cluster.yaml. `--shards 16` prepares large data in an array of 16 jobs. Key=value are the recipe's.
The same command again resumes: finished stages are not repeated, a training that was interrupted resumes. Stages are
command lines (launch/chain/stages.py).
Nothing here imports what they run.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.file_system import free_disk
    from nano3.outputs import alone, check_claim, claim
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from launch.chain import shards
from launch.chain.records import KIND, Records
from launch.chain.stages import NAMES, Chain, Stage, model_folder, recipe_script
from launch.chain.submission import print_scripts, submit_all
from launch.local import run_child
from launch.plan.hardware import GIB
from launch.plan.mounts import parse_mount
from launch.plan.plan_export import model_bytes, plan_export
from launch.plan.preflight_checks import unmounted
from launch.slurm.cluster import Cluster
from launch.slurm.job_queue import queue
from nano3.arch import Arch

ROOT = Path(__file__).resolve().parents[1]
RESOURCES = ("nodes", "gpus_per_node", "ranks")
"""Flags that are the recipe's own and go there as they are."""
POLL_SECONDS = 5
"""Between two looks at the queue with `status --wait`."""


def parser() -> argparse.ArgumentParser:
    """Flags of `run`."""
    parse = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        prog="pipeline.py run",
    )
    parse.add_argument("--model", required=True, help="Hugging Face folder of the base, or pico")
    parse.add_argument("--input", type=Path, required=True, action="append", help="chat JSONL to train on; repeatable")
    parse.add_argument("--questions", type=Path, required=True, help="held-out chat JSONL to score")
    parse.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parse.add_argument(
        "--recipe",
        default="recipes.nemotron_lora",  # not its path, which would count from where you stand
        metavar="FILE.py",
        help="recipe that trains: a file, or module:function (default: recipes.nemotron_lora)",
    )
    parse.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE.yaml", help="the recipe's; repeatable"
    )
    parse.add_argument("--local", action="store_true", help="run here, training on CPU ranks")
    parse.add_argument("--ranks", type=int, help="CPU ranks with --local (default: 1)")
    parse.add_argument("--cluster", type=Path, help="site file (default without --local: cluster.yaml)")
    parse.add_argument("--nodes", type=int, help="machines that train (default: 1)")
    parse.add_argument("--gpus-per-node", type=int, help="GPUs of each (default: the recipe's)")
    parse.add_argument(
        "--shards", type=int, default=0, help="jobs of a Slurm array that prepare the data (default: one)"
    )
    parse.add_argument("--shards-at-once", type=int, default=0, help="most of them at the same time (default: Slurm's)")
    parse.add_argument(
        "--with",
        dest="extra",
        action="append",
        default=[],
        metavar='STAGE="FLAGS"',
        help='more flags of prepare, merge, quantize or evaluate, such as quantize="--samples 256"; repeatable',
    )
    parse.add_argument("--again", choices=NAMES, help="do this stage and what follows it over; old adapters are kept")
    parse.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")
    parse.add_argument("settings", nargs="*", metavar="key=value", help="the recipe's, such as train.steps=300")
    return parse


def chain_of(args: argparse.Namespace) -> Chain:
    """The chain that the arguments describe. Raises `UserError`."""
    extra: dict[str, str] = {}
    for item in args.extra:
        name, equals, flags = item.partition("=")
        if not equals or name in extra:
            raise UserError(f"--with {item!r}: write STAGE=FLAGS, once for each stage")
        extra[name] = flags
    resources = ["--local"] if args.local else []
    for name in RESOURCES:
        value = getattr(args, name)
        resources += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    resources += [word for file in args.config for word in ("--config", str(file.resolve()))]
    inputs = tuple(path.resolve() for path in args.input)
    return Chain(
        model_folder(args.model), inputs, args.questions.resolve(), args.out.resolve(),
        tuple(args.settings), tuple(resources), recipe_script(args.recipe, ROOT), extra=extra, shards=args.shards,
        at_once=args.shards_at_once,
    )  # fmt: skip


def ask_recipe(chain: Chain, site: Path | None, recipe: str) -> Chain:
    """Has the recipe check its whole command before anything runs; for a cluster it also plans memory.

    Returns the chain with what the recipe said of its settings.

    Raises:
        UserError: it refuses, and has said why; or it runs another function than `recipe` names after a colon.
    """
    command = [sys.executable, *chain.recipe(stored=False), "--dry-run"]
    command += ["--cluster", str(site), "--after", "1"] if site is not None else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError("the training would not start, see above; nothing was run")
    function, runs = recipe.partition(":")[2], re.search(r"^recipe +\S+:(\w+) ", done.stdout, re.MULTILINE)
    if function and (runs is None or runs[1] != function):
        raise UserError(f"--recipe {recipe}: the file runs {runs[1] if runs else 'another function'}; name that")
    return replace(chain, asked=tuple(re.findall(r"^  (\w+\.\w+=\S*)", done.stdout, re.MULTILINE)))


def check_room(chain: Chain, stages: tuple[Stage, ...]) -> None:
    """Raises `UserError` where the disk has no room for these stages' large outputs; training looks for its own."""
    arch, names = Arch.load(chain.model), {stage.name for stage in stages}
    # What is there for a while goes before the output comes.
    need = {plan.name: max(plan.disk, plan.scratch) for plan in plan_export(arch) if plan.name in names}
    if chain.quantizes and NAMES[-1] in names:
        need[NAMES[-1]] = model_bytes(arch)  # the FP8 folder as the values that it stands for, while it is scored
    _, free = free_disk(chain.out)
    if sum(need.values()) > free:
        raise UserError(
            f"{chain.out} needs about {sum(need.values()) / GIB:.1f} GiB for {', '.join(need)} and its disk "
            f"has {free / GIB:.1f} GiB free; free some or choose another --out"
        )


def check_container(chain: Chain, cluster: Cluster) -> None:
    """Raises `UserError` for questions that the jobs' container does not see; the recipe checks the other paths."""
    named = {"--questions": chain.questions} | {f"--input {path.name}:": path for path in chain.inputs}
    problems = unmounted(named, tuple(map(parse_mount, cluster.mounts)))
    if problems:
        raise UserError(problems[0].text)


def run_here(stages: tuple[Stage, ...], records: Records) -> int:
    """Runs the stages one after the other on this machine; the exit code of the first that fails."""
    for stage in stages:
        print(f"[{NAMES.index(stage.name) + 1}/{len(NAMES)}] {stage.name}", file=sys.stderr)
        code = run_stage(stage, records)
        if code:
            print(
                f"error: stage {stage.name} ended with exit code {code}; the same command resumes from there",
                file=sys.stderr,
            )
            return code
    return 0


def run_stage(stage: Stage, records: Records) -> int:
    """Runs a stage's commands in this repository and records how they ended; the exit code."""
    with records.timed(stage) as result:
        for command in stage.commands:
            print(f"$ python {shlex.join(command)}", file=sys.stderr, flush=True)
            result.code = run_child([sys.executable, *command], ROOT)
            if result.code:
                break
    return result.code


def start(arguments: list[str]) -> int:
    """`run`: checks everything, then runs or submits what is not finished."""
    args = parser().parse_intermixed_args(arguments)
    if args.local and args.cluster:
        raise UserError("--local runs here and --cluster on Slurm; leave one of them out")
    if args.shards_at_once and not args.shards:
        raise UserError(f"--shards-at-once {args.shards_at_once} is of an array; give --shards too")
    if args.local and args.shards:
        raise UserError('--shards is a Slurm array; here several processes prepare with --with prepare="--workers 4"')
    chain, site = chain_of(args), (args.cluster or Path("cluster.yaml")).resolve()
    check_claim(chain.out, KIND)
    os.chdir(ROOT)  # where stages run; a site file's relative paths mean the same for all of them then
    cluster = None if args.local else Cluster.load(site)
    if cluster is not None and cluster.container is not None:
        check_container(chain, cluster)
    chain = ask_recipe(chain, None if cluster is None else site, args.recipe)
    records = Records(chain.out)
    if args.dry_run:
        todo = records.unfinished(chain.stages(), args.again)
        if cluster is not None:
            print_scripts(chain, todo, cluster, site)
        else:
            print("\n".join(f"python {shlex.join(command)}" for stage in todo for command in stage.commands))
        return 0
    claim(chain.out, KIND)
    with alone(chain.out, f"another pipeline is at work on {chain.out}; wait for it, or choose another --out"):
        alive = {} if cluster is None else queue()  # before what is finished: a job that ends now is one or the other
        if args.again:
            records.forget(args.again, alive)
        stages = chain.stages()
        todo = records.unfinished(stages)
        records.refuse_other_jobs(todo, alive)
        check_room(chain, todo)
        records.plan(stages)
        for stage in stages[: len(stages) - len(todo)]:
            print(f"{stage.name:<9} finished before: {stage.output}", file=sys.stderr)
        if cluster is None:
            return run_here(todo, records)
        submit_all(todo, records, cluster, site, alive)
    return 0


def status(arguments: list[str]) -> int:
    """`status OUT`: a line for each stage. With --wait it is the end, and 1 unless all stages are finished."""
    parse = argparse.ArgumentParser(description="Where a pipeline is.", prog="pipeline.py status")
    parse.add_argument("out", metavar="OUT", type=Path, help="folder of the pipeline")
    parse.add_argument("--wait", action="store_true", help="until no job of it is queued; exit code 1 if it failed")
    args = parse.parse_args(arguments)
    records = Records(args.out.resolve())
    stages = records.planned()
    array = records.shards_job()
    jobs = {array, *(records.job(stage) for stage in stages)} - {None}
    alive = queue() if jobs else {}
    while args.wait and jobs & alive.keys():
        time.sleep(POLL_SECONDS)
        alive = queue()
    for stage in stages:
        if stage.name == NAMES[0] and array is not None:
            print(f"{shards.NAME:<9} {shards.describe(stage.output, array, alive)}")
        print(f"{stage.name:<9} {records.describe(stage, alive)}")
    return int(args.wait and bool(records.unfinished(stages)))


def one_stage(arguments: list[str]) -> int:
    """`stage OUT NAME`: what a job runs."""
    parse = argparse.ArgumentParser(description="Run one stage of a planned pipeline, here.", prog="pipeline.py stage")
    parse.add_argument("out", metavar="OUT", type=Path, help="folder of the pipeline")
    parse.add_argument("name", choices=NAMES)
    args = parse.parse_args(arguments)
    records = Records(args.out.resolve())
    (stage,) = [stage for stage in records.planned() if stage.name == args.name]
    return run_stage(stage, records)


def main() -> int:
    actions = {"run": start, "status": status, "stage": one_stage}
    name, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in actions:
        return actions[name](rest)
    print(__doc__)
    if name in ("-h", "--help"):
        return 0
    raise UserError(f"{name or 'nothing'!r} is no action; write run, status or stage (run --help lists the flags)")


if __name__ == "__main__":
    run(main)
