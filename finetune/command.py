"""The command line of every recipe: paths and resources as flags, the rest key=value; resolved, checked, run."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from conversion.checkpoint.output_folder import refuse_overlap
from finetune import run_cluster, run_local
from finetune.checks import check_run
from finetune.config_file import PLACES, read_config
from finetune.eval_only import evaluate, evaluation_run
from finetune.initial import adopt
from finetune.recipe_file import Recipe, recipe_of, refuse_while_loading
from finetune.run_local import KIND, length_of_run, refuse_finished, with_steps
from finetune.setting_sentences import help_text, text_of
from finetune.settings import Run, Settings
from launch.plan.layout import Layout
from launch.plan.plan_settings import default_layout
from launch.plan.run_length import DEFAULT_EPOCHS
from launch.slurm.cluster import CPU, Cluster
from launch.slurm.sbatch import read_seeds
from nano3.arch import PRESETS, Arch, is_nemo_checkpoint, resolve_model
from nano3.cli import UserError
from nano3.mixture import is_mixture, read_mixture
from nano3.outputs import check_claim
from nano3.overrides import apply_overrides, apply_values, flatten
from nano3.tensor_names import adaptable, adapter_shapes

OWN_DATA = ("--model", "--data", "--config", "--help-settings")
"""With one of these a recipe that is a demo too trains as the others do, and makes no data of its own."""
GPUS_PER_NODE = 8
MOST_RANKS = 65_536
"""Ranks of a machine, and machines, that are believed: a larger number is a slip of the hand."""
INSTEAD: tuple[tuple[str, str, Callable[[], Any]], ...] = (
    ("train.steps", "train.epochs", lambda: None),
    ("train.epochs", "train.steps", lambda: None),
    ("lora.preset", "lora.targets", list),
)
"""A setting that is given in one place stands for another one that an earlier place gave, which is emptied."""
BALANCE_WARNING = (
    "router      balance: the routers' correction biases MOVE in training. They are saved with the adapter and merged; "
    "the adapter without them is another model"
)


def parser(description: str | None = None, gpus: int = GPUS_PER_NODE) -> argparse.ArgumentParser:
    """Flags for paths and resources, by default so many `gpus` a machine; the rest is key=value."""
    parse = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--model", help="pico, nano, or a folder (default: cluster.yaml's, or nano)")
    parse.add_argument(
        "--base",
        type=Path,
        help="NeMo checkpoint of MODEL (default: OUT/base, imported from MODEL when the run starts)",
    )
    parse.add_argument(
        "--data",
        type=Path,
        help="token store to train on, or a mixture of several (YAML) (default on a cluster: cluster.yaml's)",
    )
    parse.add_argument("--validation", type=Path, help="token store to validate on (default: no validation)")
    parse.add_argument("--out", type=Path, help="folder to write (default: runs/lora)")
    parse.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.yaml",
        help="settings and paths from a file, such as the config.yaml of an earlier OUT; what is given here wins, and "
        "of several files the later",
    )
    parse.add_argument("--nodes", type=int, help="machines (default: 1)")
    parse.add_argument("--gpus-per-node", type=int, help=f"GPUs of each machine (default: {gpus})")
    parse.add_argument("--local", action="store_true", help="run on CPU ranks of this machine instead of GPUs")
    parse.add_argument("--ranks", type=int, help="CPU ranks with --local (default: 1)")
    parse.add_argument("--eval-only", action="store_true", help="loss and accuracy on --validation, no training")
    parse.add_argument(
        "--adapter", help="with --eval-only: adapter folder, or none for the base (default: OUT/adapter if it exists)"
    )
    parse.add_argument(
        "--cluster", type=Path, help="site file of a Slurm cluster (default with --nodes above 1: cluster.yaml)"
    )
    parse.add_argument(
        "--after",
        type=int,
        metavar="JOB",
        help="on a cluster: job that makes --data or --base; this run's job looks at them when it starts",
    )
    parse.add_argument("--array", metavar="SEEDS", help="on a cluster: a run for each of 1,2,3 in OUT/seed-1 and so on")
    parse.add_argument("--follow", action="store_true", help="on a cluster: show the job's log until it ends")
    parse.add_argument("--dry-run", action="store_true", help="print recipe, layout and job script, start nothing")
    parse.add_argument(
        "--help-settings",
        nargs="?",
        const="",
        metavar="GROUP",
        help="explain every key=value, or those of a group such as train, and end",
    )
    parse.add_argument("--overwrite", action="store_true", help="start over in an OUT that has a run")
    parse.add_argument("settings", nargs="*", metavar="key=value", help="for example layout.ep=8 lora.rank=16")
    return parse


def has_data() -> bool:
    """Whether the command line names what to train on, or asks for a recipe's settings."""
    return any(word.partition("=")[0] in OWN_DATA for word in sys.argv)


def filled(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with what the --config files say of paths and resources, then cluster.yaml, then the defaults.

    What was read goes along: `site`, None for this machine, and `configs`, (file, paths, settings) of each file.
    """
    if hasattr(args, "site"):
        return args
    filled = argparse.Namespace(**vars(args))
    filled.configs = [(str(file), *read_config(file)) for file in args.config]
    for _, places, _ in reversed(filled.configs):
        for name, value in places.items():
            if getattr(filled, name) in (None, False):
                setattr(filled, name, Path(value) if name in ("base", "data", "validation", "out") else value)
    filled.out = filled.out or Path("runs/lora")
    filled.nodes = 1 if filled.nodes is None else filled.nodes
    for flag in ("nodes", "gpus_per_node", "ranks"):
        if (number := getattr(filled, flag)) is not None and not 1 <= number <= MOST_RANKS:
            raise UserError(f"--{flag.replace('_', '-')} {number} must be at least 1 and at most {MOST_RANKS:,}")
    filled.site = site = _site(filled)
    filled.model = filled.model or (site and site.model) or "nano"
    filled.data = filled.data or (Path(site.data) if site and site.data else None)
    return filled


def layered(settings: Settings, args: argparse.Namespace) -> dict[str, str]:
    """Sets on a recipe's `settings` what cluster.yaml, the --config files and the command line give; the later wins.

    `args` are filled. Returns for every key that one of them gave who it was that won.
    """
    won: dict[str, str] = {}
    layers = [("cluster.yaml", partial(apply_overrides, settings, args.site.settings))] if args.site else []
    layers += [(file, partial(apply_values, settings, values, file)) for file, _, values in args.configs]
    for where, apply in [*layers, ("command line", partial(apply_overrides, settings, args.settings))]:
        given = apply()
        won |= dict.fromkeys(given, where)
        for key, other, empty in INSTEAD:
            if key in given and other not in given:
                group, _, name = other.partition(".")
                setattr(getattr(settings, group), name, empty())
    return won


def resolve(
    args: argparse.Namespace, defaults: Callable[[], Settings] = Settings, recipe: Recipe | None = None
) -> tuple[Run, Arch]:
    """The run that the arguments describe, its settings, layout, targets and paths checked. Raises `UserError`."""
    args = filled(args)
    site = args.site
    model, base = _model(args.model)
    arch = Arch.load(model)
    if args.base is not None:
        if base is not None:
            raise UserError("--model is a NeMo checkpoint itself; leave --base out, or give the Hugging Face folder")
        base = args.base.resolve()
    if args.local and (args.nodes != 1 or args.gpus_per_node is not None):
        raise UserError(
            "--local runs on CPU ranks of this machine; leave --nodes and --gpus-per-node out, give --ranks"
        )
    if args.ranks is not None and not args.local:
        raise UserError("--ranks counts CPU ranks; give --local too, or --gpus-per-node for GPUs")
    cpu = args.local or (site is not None and site.hardware == CPU)
    per_node = args.gpus_per_node or (GPUS_PER_NODE if site is None else site.ranks_per_node)
    ranks = (args.ranks or 1) if args.local else per_node
    settings = defaults()
    if not cpu and settings.layout == Layout():
        settings.layout = default_layout(arch, ranks)
    layered(settings, args)
    if settings.lora.init_from:
        adopt(settings.lora)
    run = Run(
        model=str(model),
        base=str(base or args.out.resolve() / "base"),
        data=str(args.data.resolve()) if args.data else "",
        validation=str(args.validation.resolve()) if args.validation else None,
        out=str(args.out.resolve()),
        nodes=args.nodes,
        ranks_per_node=ranks,
        cpu=cpu,
        settings=settings,
        recipe=recipe,
    )
    if args.eval_only and args.overwrite:
        raise UserError("--eval-only trains nothing and overwrites no run; leave --overwrite out")
    if args.eval_only:
        run = evaluation_run(run, args.adapter)
    elif args.adapter:
        raise UserError("--adapter is what --eval-only evaluates; give that too")
    check_run(run, arch)
    stores = read_mixture(args.data).stores if args.data and is_mixture(args.data) else ()
    sources = [model, base, args.data, *stores, args.validation, settings.lora.init_from or None]
    refuse_overlap(args.out, *(Path(source) for source in sources if source is not None))
    return run, arch


def _site(args: argparse.Namespace) -> Cluster | None:
    """The cluster that the run goes to, None for this machine; without a site file --dry-run takes the example."""
    if args.cluster is None and (args.nodes in (None, 1) or args.local):
        return None
    example = args.dry_run and args.cluster is None
    return run_cluster.site_of(args.cluster or Path("cluster.yaml"), args.nodes, args.gpus_per_node, example)


def _model(name: str) -> tuple[Path, Path | None]:
    """The folder with config.json, and the NeMo checkpoint when `name` is one."""
    folder = Path(name)
    if name not in PRESETS and is_nemo_checkpoint(folder):
        return (folder / "hf").resolve(), folder.resolve()
    return resolve_model(name).resolve(), None


def trainable_parameters(run: Run, arch: Arch) -> int:
    """Adapter parameters of the whole model: rank * (in + out) for every adapter, and its magnitudes under DoRA.

    Rows that pad the vocabulary are not counted: they never get a gradient.
    """
    lora, modules = run.settings.lora, adaptable(arch)
    return sum(
        math.prod(shape)
        for path, size in lora.adapters(arch).items()
        for shape in adapter_shapes(modules[path], size.rank, lora.experts == "each", lora.dora).values()
    )


def winners(given: argparse.Namespace, args: argparse.Namespace, defaults: Settings, run: Run) -> dict[str, str]:
    """Who gave each setting of the run, its paths and resources, where it was not the recipe or a default.

    `given` are the arguments as typed, `args` the same filled.
    """
    site = args.site
    derived = {name: "cluster.yaml" for name in ("model", "data") if site is not None and getattr(site, name)}
    derived |= {name: file for file, places, _ in args.configs for name in places}
    derived |= {name: "command line" for name in PLACES if getattr(given, name) not in (None, False)}
    if not run.cpu and defaults.layout == Layout():
        derived["layout.ep"] = "derived from the GPUs of a node"
    won = layered(defaults, args)
    if run.settings.train.steps is None:
        epochs = run.settings.train.epochs or DEFAULT_EPOCHS
        derived["train.steps"] = f"derived: {epochs:g} passes over the data"
    return derived | {key: where for key, where in won.items() if key != "train.steps" or run.settings.train.steps}


def describe(run: Run, arch: Arch, won: Mapping[str, str]) -> str:
    """The resolved recipe for people; `won` says who gave a setting, where it was not the recipe."""
    name = f"{run.recipe.name} ({run.recipe.file})" if run.recipe else "(none)"
    lines = [f"recipe      {name}"]
    by = {name: f"  [{won.get(name, 'default')}]" for name in PLACES}
    size = f"({arch.parameters:,} parameters, {arch.active_parameters:,} active)"
    lines += [f"model       {run.model} {size}{by['model']}", f"store       {run.data or '(none given)'}{by['data']}"]
    lines += [f"out         {run.out}{by['out']}"]
    lines += [f"adapters    {trainable_parameters(run, arch):,} parameters"]
    lines += [BALANCE_WARNING] if run.settings.router == "balance" else []
    lines += ["settings"]
    for key, value in flatten(run.settings).items():
        lines.append(f"  {f'{key}={text_of(value)}':<40} {won.get(key, 'recipe')}")
    return "\n".join([*lines, "layout", run.settings.layout.describe(arch, run.ranks)])


def train(run: Run, arch: Arch, overwrite: bool = False) -> int:
    """Checks the data and runs the recipe on this machine, from the newest checkpoint if OUT has one; the exit code."""
    run_local.check_data(run, arch)
    return run_local.train(run, overwrite)


def _on_cluster(args: argparse.Namespace, site: Cluster, run: Run, arch: Arch) -> int:
    """Checks the run and submits it to Slurm; with --dry-run prints what preflight says and the script."""
    for flag, given in (("--local", args.local), ("--eval-only", args.eval_only), ("--overwrite", args.overwrite)):
        if given:
            raise UserError(f"{flag} is for runs on this machine; leave it out with --cluster or --nodes above 1")
    if not args.dry_run and args.after is None:
        run_local.check_data(run, arch, contents=False)
    seeds = read_seeds(args.array) if args.array else ()
    return run_cluster.submit(run, site, args.dry_run, args.after, args.follow, seeds)


def main(
    description: str | None,
    defaults: Callable[[], Settings],
    recipe: Callable[[Run], Any],
    gpus_per_node: int = GPUS_PER_NODE,
) -> int:
    """A recipe's command line: its own defaults, and the function itself that makes its configuration.

    `gpus_per_node`: of a machine that no cluster.yaml describes.
    """
    refuse_while_loading()
    given = parser(description, gpus_per_node).parse_intermixed_args()
    if given.help_settings is not None:
        print(help_text(defaults(), given.help_settings))
        return 0
    args = filled(given)
    if args.site is None and not args.local and args.gpus_per_node is None:
        args.gpus_per_node = gpus_per_node
    run, arch = resolve(args, defaults, recipe_of(recipe))
    won, site = winners(given, args, defaults(), run), args.site
    check_claim(run.out, KIND)
    if site is None and (args.after is not None or args.follow or args.array):
        raise UserError("--after, --follow and --array are about jobs of Slurm; give --cluster too")
    if args.dry_run:
        if args.data and args.after is None:
            run_local.check_data(run, arch, contents=False)
            if not run.eval_only:
                length = length_of_run(run)
                print("\n".join(length.describe()))
                run = with_steps(run, length)
        print(describe(run, arch, won))
        return _on_cluster(args, site, run, arch) if site is not None else 0
    if site is not None:
        return _on_cluster(args, site, run, arch)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not run.cpu and gpus < run.ranks_per_node:
        raise UserError(
            f"the run requires {run.ranks_per_node} NVIDIA GPUs and this machine has {gpus}; give --gpus-per-node, add "
            "--local to run on CPU ranks, or --dry-run to see the recipe"
        )
    if run.eval_only:
        run_local.check_data(run, arch)
        return evaluate(run)
    if not args.overwrite:
        refuse_finished(Path(run.out))
    return train(run, arch, args.overwrite)
