"""How fast is a LoRA training step on a CPU, against transformers with PEFT? Tokens a second on pico.

    python benchmarks/bench_step.py --out runs/bench_step.json
    python benchmarks/bench_step.py --lengths 2048 --repeats 20 --experts none

Three loops, each a process with one thread, take turns step by step on the same packs: transformers with PEFT,
Megatron-Core's own loop, and the whole recipe through NeMo and Lightning. All in FP32, the same rank and targets,
forward to optimizer step. A pack holds one document, so that all three compute the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lockstep import Job, Step, Worker
from results import ROOT, conditions, save

from nano3.arch import Arch, resolve_model
from nano3.cli import UserError, run

SCRIPTS = {"peft": "step_peft.py", "megatron": "step_megatron.py", "recipe": "step_recipe.py"}
STARTS = 3
"""How often every loop is started anew: where its memory lies changes a process's speed by 5 %, for its whole life."""
WARMUP = 3
"""Rounds that are not counted: first calls allocate, and adapters move before A has a gradient."""
LENGTHS = (512, 1024, 2048, 4096, 8192)
SAME_LOSS = 1e-4
"""Largest relative difference of the first losses: the loops must do the same work to be compared."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="positions in a step (default: %(default)s)"
    )
    parse.add_argument(
        "--repeats", type=int, default=15, help="counted steps of a loop from each start (default: %(default)s)"
    )
    parse.add_argument(
        "--starts", type=int, default=STARTS, help="how often each loop is started anew (default: %(default)s)"
    )
    parse.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parse.add_argument("--experts", default="shared", help="lora.experts of the recipe (default: %(default)s)")
    parse.add_argument("--out", type=Path, help="JSON file to write")
    return parse


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be measured. Raises `UserError`."""
    if min(args.repeats, args.starts) < 1 or min(args.lengths) < 2:
        raise UserError("--repeats and --starts must be at least 1 and every length at least 2")


def write_data(folder: Path, arch: Arch, length: int, documents: int) -> Path:
    """A token store of random documents that fill a pack of `length` each."""
    import numpy as np

    from data_prep.packing import build_packs
    from data_prep.store import StoreWriter
    from data_prep.tokens import ChatTokenizer
    from nano3.outputs import fresh_output
    from nano3.token_store import KIND, TokenStore

    rng = np.random.default_rng(length)
    store = folder / f"store-{length}"
    with fresh_output(store, KIND) as out:
        writer = StoreWriter(out)
        for _ in range(documents):
            mask = np.ones(length + 1, dtype=np.uint8)
            mask[0] = 0
            writer.add(rng.integers(3, arch.vocab_size, length + 1), mask, "random")
        writer.finish(ChatTokenizer("pico"))
    build_packs(TokenStore(store), length)
    return store


def rounds(workers: dict[str, Worker], repeats: int) -> dict[str, list[Step]]:
    """The counted steps of every worker; they take turns, and each round begins with another one."""
    names, steps = list(workers), {name: [] for name in workers}
    for number in range(WARMUP + repeats):
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            steps[name].append(workers[name].step())
    first = {name: taken[0].loss for name, taken in steps.items()}
    if max(first.values()) - min(first.values()) > SAME_LOSS * max(first.values()):
        raise UserError(f"the loops do not compute the same loss for the same pack: {first}; this is a bug")
    return {name: taken[WARMUP:] for name, taken in steps.items()}


def measure(folder: Path, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: all loops at one length, from all starts."""
    model, steps = resolve_model("pico"), WARMUP + args.repeats
    store = write_data(folder, Arch.load(model), length, min(steps, 8))
    base = str(folder / "base")
    taken: dict[str, list[Step]] = {name: [] for name in SCRIPTS}
    for start in range(args.starts):
        with ExitStack() as stack:
            workers = {}
            for name, script in SCRIPTS.items():
                out = folder / f"{name}-{length}-{start}"
                out.mkdir()
                shape = (length, args.rank, 2.0 * args.rank, args.experts, steps)
                job = Job(str(model), base, str(store), str(out), *shape)
                workers[name] = stack.enter_context(Worker(script, job))
            facts = {name: worker.ready() for name, worker in workers.items()}
            for name, more in rounds(workers, args.repeats).items():
                taken[name] += more
    return {"length": length, "facts": facts, "steps": {k: [asdict(s) for s in v] for k, v in taken.items()}}


def ratios(row: dict[str, Any], slow: str, fast: str, clock: str) -> list[float]:
    """How many times as fast, round by round, sorted; `clock` is wall or cpu."""
    pairs = zip(row["steps"][slow], row["steps"][fast], strict=True)
    return sorted(a[clock] / b[clock] for a, b in pairs)


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a row: medians over the rounds, and the middle half of the ratios."""
    wall = {name: statistics.median(step["wall"] for step in steps) for name, steps in row["steps"].items()}
    ratio = ratios(row, "peft", "recipe", "wall")
    return {
        "tokens_per_second": {name: row["length"] / seconds for name, seconds in wall.items()},
        "ratio": statistics.median(ratio),
        "ratio_quartiles": [ratio[len(ratio) // 4], ratio[-1 - len(ratio) // 4]],
        "ratio_cpu_time": statistics.median(ratios(row, "peft", "recipe", "cpu")),
        "ratio_without_nemo": statistics.median(ratios(row, "peft", "megatron", "wall")),
        "share_of_nemo_and_lightning": 1 - 1 / statistics.median(ratios(row, "recipe", "megatron", "wall")),
    }


def line(length: int, s: dict[str, Any]) -> str:
    """One line of the Markdown table."""
    rate, (low, high) = s["tokens_per_second"], s["ratio_quartiles"]
    speeds = " | ".join(f"{rate[name]:,.0f}" for name in SCRIPTS)
    return (
        f"| {length} | {speeds} | {s['ratio']:.2f} ({low:.2f} to {high:.2f}) | {s['ratio_cpu_time']:.2f} "
        f"| {s['ratio_without_nemo']:.2f} | {s['share_of_nemo_and_lightning']:.0%} |"
    )


COLUMNS = ("positions", "transformers + PEFT, tokens/s", "Megatron-Core's loop", "the recipe",
           "recipe / PEFT (middle half)", "by CPU time", "Megatron-Core / PEFT", "NeMo and Lightning")  # fmt: skip
HEAD = f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """What these numbers mean nothing without."""
    return {
        **conditions(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "peft", "megatron-core", "nemo-toolkit")
        },
        "rank": args.rank,
        "experts": args.experts,
        "repeats": args.repeats,
        "starts": args.starts,
    }


def notes(experts: str) -> str:
    """What the reference is, in words, for whoever reads the table alone."""
    differ = "no adapters on routed experts on either side" if experts == "none" else (
        "on routed experts the recipe has one adapter for all of a layer; PEFT, which has none such, one for each "
        "(target_parameters on the fused weights)"
    )  # fmt: skip
    return (
        "One process and one thread each, FP32, one document of random tokens a step, forward to optimizer step. "
        "PEFT's refusal of Mamba's out_proj is patched away; q, k and v have an adapter each there, one together here; "
        f"{differ}. "
        "transformers runs its PyTorch path, as it does on any CPU: mamba-ssm and causal-conv1d have no CPU kernels."
    )


def main() -> int:
    args = parser().parse_args()
    check(args)
    facts, rows = facts_of(args), []
    print(json.dumps(facts), notes(args.experts), HEAD, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        convert = [sys.executable, str(ROOT / "conversion" / "hf_to_nemo.py"), "pico", str(folder / "base")]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        for length in args.lengths:
            print(f"{length} positions ...", file=sys.stderr, flush=True)
            row = measure(folder, length, args)
            rows.append(row | {"summary": summary(row)})
            print(line(length, rows[-1]["summary"]), flush=True)
    save(args.out, facts, rows)
    return 0


if __name__ == "__main__":
    run(main)
