"""Says what a run would meet on a cluster before it waits in a queue: rules, memory, speed, and what else would fail.

    python launch/preflight.py --hardware h100 --nodes 2 --seq 8192 layout.ep=8
    python launch/preflight.py --hardware b300 --nodes 1 --data STORE --out OUT --model FOLDER
    python launch/preflight.py --hardware h100 --nodes 2 --search

Exit code 0: it fits; 1: it does not fit, or cannot be right; 2: the arguments are wrong. Settings (key=value) have the
recipe's names; without layout settings experts are as wide as a node's GPUs. Nothing is imported that takes time,
and nothing runs on a GPU. What the figures stand on: docs/memory.md. **Not verified on a GPU.**
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

from launch.plan.hardware import HARDWARE, Gpu, find_gpu
from launch.plan.layout import Layout
from launch.plan.layout_rules import nearest
from launch.plan.memory import MemoryPlan, plan_memory
from launch.plan.mounts import parse_mount
from launch.plan.plan_export import table as export_table
from launch.plan.plan_settings import Plan, default_layout
from launch.plan.preflight_checks import (
    Finding,
    Paths,
    check_model,
    check_mounts,
    check_output,
    check_overlap,
    check_store,
    check_validation,
    check_versions,
)
from launch.plan.rules import check_settings
from launch.plan.run_length import steps_of
from launch.plan.search import EVERY, Candidate, fitting, refuse_layout
from launch.plan.throughput import Estimate, errors, estimate
from nano3.arch import PRESETS, Arch, is_nemo_checkpoint, resolve_model
from nano3.overrides import apply_overrides

SHOWN = 12
"""Layouts that --search prints."""
NEAREST = 3
"""Layouts that are named when one does not fit."""


def parser() -> argparse.ArgumentParser:
    """Flags for hardware and paths; the rest is key=value."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--hardware", required=True, help=", ".join(HARDWARE))
    parse.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parse.add_argument("--gpus-per-node", type=int, help="GPUs of each that are used (default: all)")
    parse.add_argument(
        "--model", default="nano", help=f"{', '.join(PRESETS)}, a Hugging Face folder or a NeMo checkpoint"
    )
    parse.add_argument("--data", type=Path, help="token store")
    parse.add_argument("--validation", type=Path, help="token store to validate on")
    parse.add_argument("--out", type=Path, help="folder that the run will write")
    parse.add_argument("--seq", type=int, help="tokens of a pack, short for train.seq_length")
    parse.add_argument("--container", action="store_true", help="the run is in a container; --mount says what it sees")
    parse.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="OUTSIDE[:INSIDE[:FLAGS]]",
        help="a mount of it; may be repeated",
    )
    parse.add_argument("--rules-only", action="store_true", help="look at no file: rules, memory and speed only")
    parse.add_argument("--search", action="store_true", help="rank all valid layouts that fit")
    parse.add_argument("--errors", action="store_true", help="show how far off the estimate is on published rows")
    parse.add_argument("settings", nargs="*", metavar="key=value", help="for example layout.tp=2 train.recompute=moe")
    return parse


@dataclass
class Request:
    """What was asked. Raises `UserError` for numbers that mean nothing."""

    gpu: Gpu
    nodes: int
    per_node: int
    arch: Arch
    plan: Plan
    paths: Paths

    def __post_init__(self) -> None:
        if self.nodes < 1 or not 1 <= self.per_node <= self.gpu.most_per_node:
            raise UserError(
                f"--nodes {self.nodes} must be at least 1 and --gpus-per-node {self.per_node} from 1 to "
                f"{self.gpu.most_per_node}, the GPUs of a {self.gpu.name} node"
            )

    @property
    def ranks(self) -> int:
        """GPUs of the run."""
        return self.nodes * self.per_node


def read_request(args: argparse.Namespace) -> Request:
    """The request that the arguments describe; `UserError` where they mean nothing."""
    gpu, folder = find_gpu(args.hardware), Path(args.model)
    nemo = args.model not in PRESETS and is_nemo_checkpoint(folder)
    arch = Arch.load(folder / "hf" if nemo else resolve_model(args.model))
    mounts = tuple(map(parse_mount, args.mount))
    if mounts and not args.container:
        raise UserError("--mount says what a container sees; give --container too")
    paths = Paths(
        model=folder if nemo else resolve_model(args.model),
        data=args.data,
        validation=args.validation,
        out=args.out,
        mounts=mounts if args.container else None,
    )
    request = Request(gpu, args.nodes, args.gpus_per_node or gpu.gpus_per_node, arch, Plan(), paths)
    request.plan.layout = default_layout(arch, request.per_node)
    length = [] if args.seq is None else [f"train.seq_length={args.seq}"]
    apply_overrides(request.plan, [*args.settings, *length])
    check_settings(request.plan, arch)
    return request


def look(plan: Plan, arch: Arch, paths: Paths, nodes: int) -> tuple[list[Finding], int | None]:
    """Everything that is on disk; and the packs of the store."""
    found, packs = check_store(plan, arch, paths)
    found += check_validation(plan, arch, paths)
    found += check_overlap(paths)
    found += check_model(paths)
    found += check_output(plan, arch, paths, nodes)
    found += check_mounts(paths)
    return found + check_versions(paths.mounts is not None), packs


def report_cpu(plan: Plan, arch: Arch, paths: Paths, nodes: int) -> tuple[int, str]:
    """(exit code, what to print) for nodes without GPUs: the files are looked at; there is no plan of memory or speed.

    The layout is the recipe's to check, which every run does.
    """
    found, _ = look(plan, arch, paths, nodes)
    lines = ["CPU ranks: memory and speed are not planned; what is on disk was looked at"]
    return int(any(finding.wrong for finding in found)), "\n".join([*lines, *map(str, found)])


def alternatives(request: Request) -> list[Candidate]:
    """The layouts that fit and differ least from the one that does not."""
    near = nearest(
        request.arch, request.plan.layout, request.ranks, request.plan.train.seq_length,
        request.plan.train.global_batch, request.per_node, number=EVERY,
    )  # fmt: skip
    fits = fitting(request.arch, request.plan, request.gpu, request.ranks, request.per_node)
    by_layout = {candidate.plan.layout.settings(Layout()): candidate for candidate in fits}
    names = [layout.settings(Layout()) for layout in near]
    return [by_layout[name] for name in names if name in by_layout][:NEAREST]


def _imbalance(memory: MemoryPlan, gpu: Gpu) -> str:
    """What is planned for uneven experts and what would still fit; nothing for a model without."""
    if not memory.work.arch.moe_layers:
        return ""
    most = memory.largest_imbalance(gpu)
    limit = f"fits up to {most:.2f}" if most is not None else "fits at none"
    return f"; experts' imbalance planned {memory.work.batch.imbalance:.2f}, {limit}"


def verdict(request: Request, memory: MemoryPlan, speed: Estimate, packs: int | None) -> list[str]:
    """The plan in words: fits or not, what is tightest, how fast, how long."""
    gpu, plan = request.gpu, request.plan
    fits, tightest = memory.fits(gpu), memory.tightest
    lines = [
        f"{'fits' if fits else 'DOES NOT FIT'}: {plan.layout.settings(plan.layout)} on {request.ranks} {gpu.name}, "
        f"{plan.train.seq_length} tokens a pack",
        memory.table(gpu),
        f"  tightest: stage {tightest.stage}, most of it {tightest.largest()}" + _imbalance(memory, gpu),
        f"  estimate: {speed.tokens_per_second:,.0f} tokens/s/GPU, {speed.seconds:.1f} s a step ({speed.shares()});",
        *(["  the estimate is of a base in 16 bits: how long dequantizing takes was not measured"] if plan.nf4 else []),
        f"  {_length(plan, speed, packs, request.ranks)}Published rows are met within a third (--errors); 'host' is "
        "what longer packs win back",
    ]
    if packs is not None:
        step = speed.seconds / plan.train.global_batch
        lines.append(f"  one pass over the {packs} packs takes {packs * step / 3600:.2f} h")
    if not fits:
        near = alternatives(request)
        lines.append("  nearest that fit:" if near else "  no layout fits on these ranks: shorter packs or more nodes")
        lines += [candidate.row(gpu, plan) for candidate in near]
    return lines


def _length(plan: Plan, speed: Estimate, packs: int | None, ranks: int) -> str:
    """How long the run takes and what it costs, where its number of steps is given or the store is known."""
    if plan.train.steps is None and packs is None:
        return ""
    steps = steps_of(plan.train, packs or 0)
    minutes = speed.seconds * steps / 60
    time = f"{minutes / 60:.1f} h" if minutes >= 120 else f"{minutes:.0f} minutes"
    tokens = steps * plan.train.global_batch * plan.train.seq_length
    cost = f"{tokens / 1e6:,.1f}M tokens at most, {minutes * ranks / 60:,.1f} GPU-hours"
    return f"{steps} steps take {time}: {cost}. "


def report(request: Request, files: bool) -> tuple[int, str]:
    """(exit code, what to print) of a request; `files`: whether to look at what is on disk."""
    try:
        refuse_layout(request.arch, request.plan, request.ranks, request.per_node)
        work = request.plan.workload(request.arch, request.ranks)
    except UserError as refused:
        near = fitting(request.arch, _valid_batch(request), request.gpu, request.ranks, request.per_node)[:NEAREST]
        lines = [f"CANNOT BE RIGHT: {refused}", *(["  these fit:"] if near else [])]
        return 1, "\n".join([*lines, *(candidate.row(request.gpu, request.plan) for candidate in near)])
    found, packs = look(request.plan, request.arch, request.paths, request.nodes) if files else ([], None)
    memory, speed = plan_memory(work), estimate(work, request.gpu)
    lines = verdict(request, memory, speed, packs)
    lines += map(str, found)
    lines.append(export_table(request.arch))
    good = memory.fits(request.gpu) and not any(finding.wrong for finding in found)
    return (0 if good else 1), "\n".join(lines)


def _valid_batch(request: Request) -> Plan:
    """The plan with a global batch and a pack length that every layout of these ranks could take."""
    train, ranks = request.plan.train, request.ranks
    length = math.ceil(max(1, train.seq_length) / (2 * ranks)) * 2 * ranks
    batch = math.ceil(max(1, train.global_batch) / ranks) * ranks
    return replace(request.plan, train=replace(train, seq_length=length, global_batch=batch))


def search(request: Request) -> tuple[int, str]:
    """All valid layouts that fit, the recommended one first."""
    found = fitting(request.arch, request.plan, request.gpu, request.ranks, request.per_node)
    gpu: Gpu = request.gpu
    head = (
        f"{len(found)} valid layouts fit on {request.ranks} {gpu.name} at {request.plan.train.seq_length} tokens a pack"
    )
    rows = [candidate.row(gpu, request.plan) for candidate in found[:SHOWN]]
    rest = [f"  ... and {len(found) - SHOWN} more, slower by the estimate"] if len(found) > SHOWN else []
    return (0 if found else 1), "\n".join([head + ("; recommended:" if found else ""), *rows, *rest])


def main() -> int:
    args = parser().parse_intermixed_args()
    request = read_request(args)
    code, text = search(request) if args.search else report(request, not args.rules_only)
    print(text)
    if args.errors:
        print(errors(Arch.load(PRESETS["nano"])))
    return code


if __name__ == "__main__":
    run(main)
