"""What do stage weights, a second adapter and injected errors change? Every measure of docs/step_aware.md, 12 cells.

    python benchmarks/step_aware_table.py --seeds 1 2 3 --out runs/step_aware_table
    python benchmarks/step_aware_table.py --weights fixed --base values --steps 250 --out runs/step_aware_verify

{uniform, fixed, dynamic weights} x {one adapter, two with as many parameters} x {traces with, without injected errors}.
Every cell trains by recipes/step_aware_lora.py from the same base, data and steps; only the named factor differs. The
task is in step_aware_task.py. Prints two tables, pooled over the seeds, and what each factor changes; OUT/results.json
has all of it, seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from results import conditions, save
from scipy.stats import t
from step_aware_cells import ADAPTERS, SEQ_LENGTH, WEIGHTS, Cell, Fork, answers, import_all, in_fork, train_cell
from step_aware_task import MIXTURES, make_base, rows

from conversion.hf_to_nemo import convert
from data_prep.prepare import prepare
from evaluation.judging.questions import load_questions
from evaluation.step_measures import Judged
from evaluation.steps import Answers, measures
from finetune.whole_path import fresh_folder
from nano3.cli import run
from nano3.rows import write_rows

KIND, HELD_SEED = "step-aware-table", 1000
INJECTED = 0.5
"""Chance of an error in a trace, where traces have errors."""
OWN = {
    "unparsed": ("own", "unparsed"),
    "accuracy": ("own", "accuracy_final"),
    "EXECUTE": ("own", "accuracy_execute"),
    "RFS": ("own", "rfs"),
    "RFS-do": ("interventions", "changes"),
    "RFS-do, keeps": ("interventions", "keeps"),
    "SVR": ("own", "svr"),
    "harm": ("own", "harm"),
    "false alarms": ("own", "false_alarms"),
    "J": ("own", "j"),
    "net gain": ("own", "net_gain"),
}
GIVEN = {
    "unparsed": ("injected", "unparsed"),
    "detection": ("injected", "detection"),
    "SVR": ("injected", "svr"),
    "false alarms": ("right_execute", "false_alarms"),
    "harm": ("right_execute", "harm"),
    "J": ("given_j",),
}
"""Column -> where `measures` has it: of the model's own answers, and of its VERIFY after an EXECUTE of ours."""


def cells(seed: int, ways: Sequence[str] = tuple(WEIGHTS)) -> Iterator[Cell]:
    """Those of a seed, four for each of the `ways` to weigh stages."""
    for weights, adapters, injected in itertools.product(ways, ADAPTERS, (False, True)):
        yield Cell(weights, adapters, injected, seed)


def found(measured: dict[str, Any], where: tuple[str, ...]) -> dict[str, Any]:
    """One measure."""
    for name in where:
        measured = measured[name]
    return measured


def shown(value: dict[str, Any]) -> str:
    """In per cent, with its interval and n; of nothing there is no share."""
    if "share" not in value:
        return f"none (n {value['n']})"
    low, high = value["ci95"]
    return f"{100 * value['share']:.1f} ({100 * low:.1f} to {100 * high:.1f}), n {value['n']}"


def table(pooled: dict[str, dict[str, Any]], columns: dict[str, tuple[str, ...]]) -> list[str]:
    """Markdown: a row for each cell."""
    lines = [f"| weights, adapters, traces | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    return lines + [
        f"| {name} | {' | '.join(shown(found(one, where)) for where in columns.values())} |"
        for name, one in pooled.items()
    ]


def contrast(
    by_cell: dict[Cell, dict[str, Any]], where: tuple[str, ...], change: Callable[[Cell], Cell | None]
) -> dict[str, Any]:
    """What a factor changes: mean difference over pairs of cells that differ in it alone, with Student's interval.

    `change` gives the cell with the factor for one without, None for others. Pairs without a share on a side are left
    out.
    """
    pairs = [(one, change(one)) for one in by_cell]
    values = [
        found(by_cell[other], where)["share"] - found(by_cell[one], where)["share"]
        for one, other in pairs
        if other in by_cell and all("share" in found(by_cell[cell], where) for cell in (one, other))
    ]
    if len(values) < 2:
        return {"n": len(values)}
    mean, spread = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * spread
    return {"n": len(values), "share": mean, "ci95": [mean - half, mean + half]}


def changed(key: str, before: Any, after: Any) -> Callable[[Cell], Cell | None]:
    """For `contrast`: `before` of the field `key` becomes `after`."""
    return lambda cell: Cell(**{**vars(cell), key: after}) if getattr(cell, key) == before else None


FACTORS = {
    "injected errors": changed("injected", False, True),
    "two adapters": changed("adapters", "single", "dual"),
    "fixed weights": changed("weights", "uniform", "fixed"),
    "dynamic weights": changed("weights", "uniform", "dynamic"),
}


def label(cell: Cell) -> str:
    return f"{cell.weights}, {cell.adapters}, {'with' if cell.injected else 'without'} errors"


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def prepare_seed(folder: Path, base: Path, seed: int, steps: int, questions: int) -> None:
    """Held-out questions of a seed, and its stores with and without errors, of enough traces for `steps` packs."""
    write_rows(folder / "held.jsonl", rows(questions, HELD_SEED + seed, 0.0))
    for injected in (False, True):
        name = f"injected-{injected}"
        write_rows(folder / f"{name}.jsonl", rows(12 * steps, seed, INJECTED if injected else 0.0))
        prepare([folder / f"{name}.jsonl"], base, folder / name, seq_length=SEQ_LENGTH)


def measure_seed(folder: Path, base: Path, nemo: Path, seed: int, args: argparse.Namespace) -> None:
    """Trains and asks all cells of a seed; what each answered goes to `folder`/CELL.json."""
    folder.mkdir()
    in_fork(partial(prepare_seed, folder, base, seed, args.steps, args.questions), folder / "prepare.txt")
    questions = load_questions(folder / "held.jsonl")
    for cell in cells(seed, args.weights):
        out, started = folder / cell.name, cpu_seconds()
        out.mkdir()
        data = folder / f"injected-{cell.injected}"
        model, adapter = train_cell(cell, base, nemo, data, out, args.steps, args.rate)
        trained = cpu_seconds()
        one = answers(model, adapter, questions, out / "answers.txt")
        seconds = {"training": trained - started, "answers": cpu_seconds() - trained}
        kept = {"cell": vars(cell), "cpu_seconds": seconds, "answers": asdict(one)}
        (folder / f"{cell.name}.json").write_text(json.dumps(kept) + "\n")
        j, accuracy = (shown(found(measures(one), where)) for where in (GIVEN["J"], OWN["accuracy"]))
        print(f"seed {seed}: {label(cell)}: accuracy {accuracy}; J after our EXECUTE {j}; CPU {seconds}", flush=True)
        shutil.rmtree(out)


def kept_cells(folder: Path) -> tuple[dict[Cell, Answers], float]:
    """The cells that are done, seed by seed, and the CPU seconds that they took."""
    done, seconds = {}, 0.0
    for file in sorted(folder.glob("seed-*/*-*.json")):
        kept = json.loads(file.read_text())
        kinds = {
            kind: [Judged(**one) for one in kept["answers"][kind]] for kind in ("own", "injected", "right_execute")
        }
        done[Cell(**kept["cell"])] = Answers(**kinds, interventions=kept["answers"]["interventions"])
        seconds += sum(kept["cpu_seconds"].values())
    return done, seconds


def report(facts: dict[str, Any], out: Path) -> None:
    """Prints the tables of the cells that are done and writes results.json."""
    done, seconds = kept_cells(out)
    facts["cpu_seconds"] += seconds
    by_cell = {cell: measures(one) for cell, one in done.items()}
    together: dict[str, Answers] = {}
    for cell, one in done.items():
        together[label(cell)] = together[label(cell)] + one if label(cell) in together else one
    pooled = {name: measures(one) for name, one in together.items()}
    contrasts = {
        factor: {
            f"{kind}: {name}": contrast(by_cell, where, change)
            for kind, columns in (("own", OWN), ("given", GIVEN))
            for name, where in columns.items()
        }
        for factor, change in FACTORS.items()
    }
    print("\nown answers, %\n" + "\n".join(table(pooled, OWN)))
    print("\nVERIFY after our EXECUTE with one error, and after a right one, %\n" + "\n".join(table(pooled, GIVEN)))
    print("\nwhat a factor changes, percentage points (95 % over pairs of cells of a seed), n pairs")
    for factor, several in contrasts.items():
        print(f"{factor}: " + "; ".join(f"{name} {shown(value)}" for name, value in several.items()))
    each = [{"cell": label(cell), **vars(cell), **measured} for cell, measured in by_cell.items()]
    save(out / "results.json", {**facts, "pooled": pooled, "contrasts": contrasts}, each)
    print(f"\n{facts['cpu_seconds'] / 60:.1f} CPU minutes; {out / 'results.json'}")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: %(default)s)")
    parse.add_argument("--steps", type=int, default=60, help="packs that a cell trains on (default: %(default)s)")
    parse.add_argument("--rate", type=float, default=4e-3, help="learning rate (default: %(default)s)")
    parse.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="(default: all)")
    parse.add_argument("--base", choices=MIXTURES, default="traces", help="what it is taught (default: %(default)s)")
    parse.add_argument("--base-seed", type=int, default=0, help="(default: %(default)s)")
    parse.add_argument("--base-tokens", type=int, default=900_000, help="of the base's training (default: %(default)s)")
    parse.add_argument("--questions", type=int, default=60, help="held out, of a seed (default: %(default)s)")
    parse.add_argument("--parallel", type=int, default=1, help="seeds at a time (default: %(default)s)")
    parse.add_argument("--report", action="store_true", help="the tables of what is done in OUT, and nothing more")
    parse.add_argument("--out", type=Path, default=Path("runs/step_aware_table"), help="(default: %(default)s)")
    args = parse.parse_args()
    if args.report:
        return report(json.loads((args.out / "facts.json").read_text()), args.out)
    folder = fresh_folder(args.out, KIND)
    facts = {**conditions(), **{key: value for key, value in vars(args).items() if key not in ("out", "report")}}
    base, nemo = folder / "base", folder / "base-nemo"
    import_all()
    taught = partial(make_base, base, args.base_tokens, args.base_seed, args.base)
    facts["base_loss"] = in_fork(taught, folder / "base.txt")
    in_fork(partial(convert, base, nemo, context=False), folder / "convert.txt")
    facts["cpu_seconds"] = cpu_seconds()
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"base: loss {facts['base_loss']:.3f}, {facts['cpu_seconds']:.0f} CPU s so far", flush=True)
    for first in range(0, len(args.seeds), args.parallel):
        forks = [
            Fork(partial(measure_seed, folder / f"seed-{seed}", base, nemo, seed, args), folder / f"seed-{seed}.txt")
            for seed in args.seeds[first : first + args.parallel]
        ]
        for fork in forks:
            fork.result()
            print(fork.log.read_text(), end="", flush=True)
    return report(facts, folder)


if __name__ == "__main__":
    run(main)
