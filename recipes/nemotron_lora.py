"""LoRA fine-tuning of Nemotron-3-Nano with NeMo 2 and Megatron-Core.

    python recipes/nemotron_lora.py --nodes 2 --model /models/nano --data /data/store
    python recipes/nemotron_lora.py --model pico --data runs/demo/train --local --ranks 2 layout.ep=2

MODEL is a preset (pico, nano), a Hugging Face folder or a NeMo checkpoint; DATA a token store (data_prep/prepare.py).
Everything else is key=value in the groups layout, lora, train, router, checkpoint and log: --dry-run prints them all.
OUT/adapter is what conversion/merge_lora.py merges; OUT also has metrics.jsonl, TensorBoard events and checkpoints. A
run that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from conversion.checkpoint.folders import refuse_overlap
from conversion.checkpoint.names import adaptable, adapter_shapes
from launch.cluster import CPU, Cluster
from launch.overrides import apply_overrides, flatten
from launch.plan_settings import default_layout
from launch.slurm import read_seeds
from nano3.arch import PRESETS, Arch, is_nemo_checkpoint, resolve_model
from nano3.cli import UserError, check_output, run
from nano3.targets import select, sizes
from recipes import cluster_run, local_run
from recipes.checks import check_run
from recipes.eval_only import evaluate, evaluation_task
from recipes.initial import adopt
from recipes.local_run import KIND, refuse_finished
from recipes.settings import Run, Settings

GPUS_PER_NODE = 8
BALANCE_WARNING = (
    "router      balance: the routers' correction biases MOVE in training. They are saved with the adapter and merged; "
    "the adapter without them is another model"
)


def nemotron_3_nano_lora(task: Run) -> Any:
    """The recipe: the whole NeMo 2 configuration of a run, a `run.Partial` of `llm.finetune`.

    NeMo-Run serializes it, ships it and rebuilds it; built and called, it trains. Its parts are functions of
    recipes/lora_recipe.py, a file of its own because it imports NeMo, which takes many seconds.
    """
    from recipes.lora_recipe import lora_recipe

    return lora_recipe(task)


def parser() -> argparse.ArgumentParser:
    """Flags for paths and resources; the rest is key=value."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--model", default="nano", help="pico, nano, or a folder (default: nano)")
    parse.add_argument(
        "--base",
        type=Path,
        help="NeMo checkpoint of MODEL (default: OUT/base, imported from MODEL when the run starts)",
    )
    parse.add_argument("--data", type=Path, help="token store to train on")
    parse.add_argument("--validation", type=Path, help="token store to validate on (default: no validation)")
    parse.add_argument("--out", type=Path, default=Path("runs/lora"), help="folder to write (default: runs/lora)")
    parse.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parse.add_argument("--gpus-per-node", type=int, help=f"GPUs of each machine (default: {GPUS_PER_NODE})")
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
        help="on a cluster: job that makes what is not there yet of --data and --base",
    )
    parse.add_argument("--array", metavar="SEEDS", help="on a cluster: a run for each of 1,2,3 in OUT/seed-1 and so on")
    parse.add_argument("--follow", action="store_true", help="on a cluster: show the job's log until it ends")
    parse.add_argument("--dry-run", action="store_true", help="print the resolved recipe and layout, start nothing")
    parse.add_argument("--overwrite", action="store_true", help="start over in an OUT that has a run")
    parse.add_argument("settings", nargs="*", metavar="key=value", help="for example layout.ep=8 lora.rank=16")
    return parse


def resolve(args: argparse.Namespace) -> tuple[Run, Arch]:
    """The run that the arguments describe, its settings, layout, targets and paths checked. Raises `UserError`."""
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
    site = _site(args)
    cpu = args.local or (site is not None and site.hardware == CPU)
    per_node = args.gpus_per_node or (GPUS_PER_NODE if site is None else site.ranks_per_node)
    ranks = (args.ranks or 1) if args.local else per_node
    settings = Settings()
    if not cpu:
        settings.layout = default_layout(arch, ranks)
    apply_overrides(settings, args.settings)
    if settings.lora.init_from:
        adopt(settings.lora)
    task = Run(
        model=str(model),
        base=str(base or args.out.resolve() / "base"),
        data=str(args.data.resolve()) if args.data else "",
        validation=str(args.validation.resolve()) if args.validation else None,
        out=str(args.out.resolve()),
        nodes=args.nodes,
        ranks_per_node=ranks,
        cpu=cpu,
        settings=settings,
    )
    if args.eval_only and args.overwrite:
        raise UserError("--eval-only trains nothing and overwrites no run; leave --overwrite out")
    if args.eval_only:
        task = evaluation_task(task, args.adapter)
    elif args.adapter:
        raise UserError("--adapter is what --eval-only evaluates; give that too")
    check_run(task, arch)
    sources = [model, base, args.data, args.validation, settings.lora.init_from or None]
    refuse_overlap(args.out, *(Path(source) for source in sources if source is not None))
    return task, arch


def _site(args: argparse.Namespace) -> Cluster | None:
    """The cluster that the run goes to; None for this machine, and for a recipe that is only printed."""
    if args.cluster is None and (args.nodes == 1 or args.dry_run or args.local):
        return None
    return cluster_run.site_of(args.cluster or Path("cluster.yaml"), args.nodes, args.gpus_per_node)


def _model(name: str) -> tuple[Path, Path | None]:
    """The folder with config.json, and the NeMo checkpoint when `name` is one."""
    folder = Path(name)
    if name not in PRESETS and is_nemo_checkpoint(folder):
        return (folder / "hf").resolve(), folder.resolve()
    return resolve_model(name).resolve(), None


def trainable_parameters(task: Run, arch: Arch) -> int:
    """Adapter parameters of the whole model: rank * (in + out) for every adapter, and its magnitudes under DoRA.

    Rows that pad the vocabulary are not counted: they never get a gradient.
    """
    lora, modules = task.settings.lora, adaptable(arch)
    paths = select(arch, lora.chosen_targets(), lora.experts)
    chosen = sizes(paths, lora.rank, lora.alpha, lora.rank_pattern, lora.alpha_pattern, lora.rslora)
    return sum(
        math.prod(shape)
        for path, size in chosen.items()
        for shape in adapter_shapes(modules[path], size.rank, lora.experts == "each", lora.dora).values()
    )


def describe(task: Run, arch: Arch) -> str:
    """The resolved recipe for people."""
    lines = [f"model       {task.model} ({arch.parameters:,} parameters, {arch.active_parameters:,} active)"]
    lines += [f"data        {task.data or '(none given)'}", f"out         {task.out}"]
    lines += [f"adapters    {trainable_parameters(task, arch):,} parameters"]
    lines += [BALANCE_WARNING] if task.settings.router == "balance" else []
    lines += ["settings", *(f"  {key}={_text(value)}" for key, value in flatten(task.settings).items())]
    return "\n".join([*lines, "layout", task.settings.layout.describe(arch, task.ranks)])


def _text(value: object) -> str:
    return ",".join(str(item) for item in value) if isinstance(value, list) else str(value)


def check_data(task: Run, arch: Arch) -> None:
    """Opens the stores: packs of this length exist and every token is in the vocabulary. A base that the run does not
    import itself is there, and of this architecture. Raises `UserError`."""
    from data_prep.packing import PackedDataset

    local_run.check_base(task)
    if not task.data and not task.eval_only:
        raise UserError("no data: give --data STORE, a token store made by data_prep/prepare.py")
    for store in filter(None, (task.data, task.validation)):
        packs = PackedDataset(store, task.settings.train.seq_length, task.settings.document_multiple)
        packs.store.check_tokenizer(task.model)
        largest = packs.store.manifest["max_token_id"]
        if largest >= arch.vocab_size:
            raise UserError(f"{store} has token {largest}, but the model's vocabulary ends at {arch.vocab_size - 1}")


def train(task: Run, arch: Arch, overwrite: bool = False) -> int:
    """Checks the data and runs the recipe on this machine, from the newest checkpoint if OUT has one; the exit code."""
    check_data(task, arch)
    return local_run.train(task, overwrite)


def _on_cluster(args: argparse.Namespace, site: Cluster, task: Run, arch: Arch) -> int:
    """Checks the run and submits it to Slurm; with --dry-run prints what preflight says and the script."""
    for flag, given in (("--local", args.local), ("--eval-only", args.eval_only), ("--overwrite", args.overwrite)):
        if given:
            raise UserError(f"{flag} is for runs on this machine; leave it out with --cluster or --nodes above 1")
    if not args.dry_run and args.after is None:
        check_data(task, arch)
    seeds = read_seeds(args.array) if args.array else ()
    return cluster_run.submit(task, site, args.dry_run, args.after, args.follow, seeds)


def main() -> int:
    args = parser().parse_intermixed_args()
    task, arch = resolve(args)
    check_output(task.out, KIND)
    site = _site(args)
    if site is None and (args.after is not None or args.follow or args.array):
        raise UserError("--after, --follow and --array are about jobs of Slurm; give --cluster too")
    if args.dry_run:
        if args.data and args.after is None:
            check_data(task, arch)
        print(describe(task, arch))
        return _on_cluster(args, site, task, arch) if site is not None else 0
    if site is not None:
        return _on_cluster(args, site, task, arch)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not task.cpu and gpus < task.ranks_per_node:
        raise UserError(
            f"the run wants {task.ranks_per_node} NVIDIA GPUs and this machine has {gpus}; give --gpus-per-node, add "
            "--local to run on CPU ranks, or --dry-run to see the recipe"
        )
    if task.eval_only:
        check_data(task, arch)
        return evaluate(task)
    if not args.overwrite:
        refuse_finished(Path(task.out))
    return train(task, arch, args.overwrite)


if __name__ == "__main__":
    run(main)
