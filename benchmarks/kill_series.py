"""Kills each long-running command at random moments, gives it again, and compares all bytes with an undisturbed run.

    python benchmarks/kill_series.py FOLDER [--tools prepare train] [--moments 20] [--seed 0]

Commands: prepare, import, import with NeMo's context (which imports NeMo), train (pico on two CPU ranks), merge,
quantize. At each moment one process of the command gets SIGKILL: itself, or, of a training, one of launcher, guard,
ranks and their helpers. 30 s later no process may be left, and the same command must end with the same files. Inputs,
the undisturbed outputs and results.jsonl lie in FOLDER: give the same command again, and moments that were tried are
skipped. About two hours on 2 cores. Exit code 1 when a moment did not recover.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from results import ROOT, conditions

from launch.guard import processes_of
from launch.local import die_with_parent
from nano3.checkpoint_metadata import read_metadata
from nano3.cli import UserError, run

VARIABLE = "NANO3_KILL_SERIES"
"""In the environment of every process of a series; its value is the folder."""
LEAVE_SECONDS = 30.0
"""How long processes may outlive the one that was killed."""
LONGEST_SECONDS = 900.0
RESULTS = "results.jsonl"

TRAIN = (
    "--model pico --local --ranks 2 layout.ep=2 train.steps=24 train.warmup=2 train.lr=1e-3 train.seq_length=512 "
    "train.global_batch=2 checkpoint.every=4 checkpoint.minutes=0 lora.rank=4 lora.alpha=8 lora.dropout=0.1"
)


@dataclass(frozen=True)
class Tool:
    """A command: its script, and what it gets before the path of its output."""

    script: str
    arguments: Callable[[Path], list[Any]]


def _inputs(folder: Path, tool: str) -> Path:
    return folder / "reference" / tool


TOOLS = {
    "prepare": Tool(
        "data_prep/prepare.py",
        lambda folder: ["--input", folder / "train.jsonl", "--tokenizer", "pico", "--seq-length", 512, "--out"],
    ),
    "import": Tool("conversion/hf_to_nemo.py", lambda _: ["pico", "--no-context"]),
    "import-context": Tool("conversion/hf_to_nemo.py", lambda _: ["pico"]),
    "train": Tool(
        "recipes/nemotron_lora.py",
        lambda folder: [*TRAIN.split(), "--data", _inputs(folder, "prepare"), "--out"],
    ),
    "merge": Tool("conversion/merge_lora.py", lambda folder: ["pico", _inputs(folder, "train") / "adapter"]),
    "quantize": Tool(
        "conversion/quantize_fp8.py",
        lambda folder: [*(_inputs(folder, "merge"), "--calibration", _inputs(folder, "prepare"), "--samples", 16)],
    ),
}
"""In the order in which each takes what one before made."""
GIVES = ("prepare", "train", "merge")
"""Those whose output another takes."""


def command(folder: Path, tool: str, out: Path) -> list[str]:
    return [sys.executable, str(ROOT / TOOLS[tool].script), *map(str, TOOLS[tool].arguments(folder)), str(out)]


def start(folder: Path, tool: str, log: Path) -> subprocess.Popen[bytes]:
    """The command, in a session of its own; every run of a tool writes to the same place, since outputs name it."""
    environment = {"OMP_NUM_THREADS": "1", "NANO3_CACHE": str(folder / "cache"), VARIABLE: str(folder)}
    out = folder / "work" / tool / "out"
    out.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        return subprocess.Popen(
            command(folder, tool, out), env=os.environ | environment, start_new_session=True, cwd=folder,
            preexec_fn=die_with_parent, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip


def end_of(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a command; 124 for one that hangs, which is ended."""
    try:
        return process.wait(LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def undisturbed(folder: Path, tool: str) -> float:
    """Makes the output that the others must equal, where it is not there yet; returns the seconds that it took."""
    reference, took = _inputs(folder, tool), folder / "reference" / f"{tool}.seconds"
    if not took.exists():
        work = folder / "work" / tool
        for old in (work, reference):
            shutil.rmtree(old, ignore_errors=True)
        begun = time.monotonic()
        if end_of(start(folder, tool, folder / f"{tool}.log")):
            raise UserError(f"{tool} fails without being killed; the reason stands in {folder / f'{tool}.log'}")
        seconds = time.monotonic() - begun
        reference.parent.mkdir(exist_ok=True)
        os.rename(work / "out", reference)
        took.write_text(f"{seconds:.2f}")
    return float(took.read_text())


def names_of(pids: list[int]) -> dict[int, str]:
    """What each process is, for the results: the first words of its command that say so."""
    names = {}
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            names[pid] = next((Path(word).name for word in words if word.endswith(".py")), " ".join(words[1:4]))
    return names


def kill_one(folder: Path, tool: str, moment: float, chance: random.Random) -> tuple[str, int]:
    """Starts the command, kills one of its processes `moment` seconds later and waits for the command to end.

    Returns which process it was, empty if all had ended by then, and the command's exit code.
    """
    process, victim = start(folder, tool, folder / f"{tool}.log"), ""
    with suppress(subprocess.TimeoutExpired):
        return victim, process.wait(moment)
    names = names_of(processes_of(str(folder), VARIABLE))
    if names:
        pid = chance.choice(sorted(names))
        victim = names[pid] + (" (launcher)" if tool == "train" and pid == process.pid else "")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return victim, end_of(process)


def left_over(folder: Path) -> list[str]:
    """Processes of the series that are still there after `LEAVE_SECONDS`; they are ended."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while (left := processes_of(str(folder), VARIABLE)) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = names_of(left)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"process left: {name}" for name in names.values()]


DIFFERS = {
    "logs/*": "what the ranks of the last attempt said, with times and process numbers",
    "tensorboard/*": "the same numbers as metrics.jsonl, with times; tests/nano3/test_tracking.py reads them back",
    "wandb/*": "the same, under an identity that W&B draws for each run",
}
"""Files that are not the same in two undisturbed runs, and why. All else is compared byte by byte but what `comparable`
leaves out."""
TIMES = ("time", "seconds", "per_second", "tflops", "memory")
"""In the names of a step's measures that are not the same twice."""


def comparable(path: Path) -> Any:
    """What of a file must be equal: its bytes, without times and without the identity that PyTorch draws for a save."""
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: row[key] for key in row if not any(word in key for word in TIMES)} for row in rows]
    if path.name == ".metadata":
        return replace(read_metadata(path), storage_meta=None)
    if path.name == "files.json":  # `.metadata` is compared itself, and the seal's own hash is over all hashes
        files = json.loads(path.read_text())["files"]
        return {name: fact for name, fact in files.items() if not name.endswith(".metadata")}
    return path.read_bytes()


def differences(one: Path, other: Path) -> list[str]:
    """Files that are not the same in both folders."""
    found = [{str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()} for folder in (one, other)]
    names = sorted(name for name in found[0].keys() | found[1].keys() if not any(fnmatch(name, way) for way in DIFFERS))
    return [
        f"differs: {name}"
        for name in names
        if any(name not in there for there in found) or comparable(found[0][name]) != comparable(found[1][name])
    ]


def attempt(folder: Path, tool: str, number: int, seed: int, seconds: float) -> dict[str, Any]:
    """One moment: killed, left behind nothing, given again unless it had done its work all the same, compared."""
    chance = random.Random(f"{seed} {tool} {number}")
    work, victim = folder / "work" / tool, ""
    while not victim:  # the machine was faster than for the undisturbed run: another moment
        shutil.rmtree(work, ignore_errors=True)
        moment = chance.uniform(0, seconds)
        victim, code = kill_one(folder, tool, moment, chance)
    problems = left_over(folder)
    finished = tool == "train" and not differences(work / "out", _inputs(folder, tool))  # it would be refused
    if code and not finished:
        code = end_of(start(folder, tool, folder / f"{tool}.log"))
        problems += [f"exit code {code} when it was given again"] if code else []
        problems += left_over(folder)
    problems += differences(work / "out", _inputs(folder, tool))
    problems += [f"left: {path.name}" for path in work.iterdir() if path.name != "out"]
    return {
        "tool": tool,
        "number": number,
        "seed": seed,
        "moment": round(moment, 2),
        "killed": victim,
        "wrong": problems,
    }


def tried(folder: Path) -> list[dict[str, Any]]:
    """What earlier calls have tried."""
    file = folder / RESULTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("folder", metavar="FOLDER", type=Path, help="folder for inputs, outputs and results; they stay")
    parse.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="only these (default: all)")
    parse.add_argument("--moments", type=int, default=20, help="random moments for each (default: 20)")
    parse.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    return parse


def make_inputs(folder: Path) -> None:
    """The rows that everything begins with."""
    if not (folder / "train.jsonl").exists():
        words = ["--task", "number_sorting", "--size", "300", "--seed", "2", "--out", str(folder / "train.jsonl")]
        subprocess.run([sys.executable, str(ROOT / "data_prep/generate.py"), *words], check=True, stdout=sys.stderr)


def main() -> int:
    args = parser().parse_args()
    if args.moments < 1:
        raise UserError("--moments must be at least 1")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(folder)
    done = {(row["tool"], row["number"], row["seed"]): row for row in tried(folder)}
    rows = []
    last = max(map(list(TOOLS).index, args.tools))
    for tool in list(TOOLS)[: last + 1]:
        seconds = undisturbed(folder, tool) if tool in args.tools or tool in GIVES else 0.0
        for number in range(args.moments if tool in args.tools else 0):
            row = done.get((tool, number, args.seed))
            if row is None:
                row = conditions() | attempt(folder, tool, number, args.seed, seconds)
                with (folder / RESULTS).open("a") as results:
                    results.write(json.dumps(row) + "\n")
            rows.append(row)
            said = "; ".join(row["wrong"]) or "recovered"
            print(f"{tool} {number + 1}/{args.moments}: {row['killed']} at {row['moment']} s: {said}", flush=True)
    right = sum(not row["wrong"] for row in rows)
    print(f"{right} of {len(rows)} recovered with equal bytes, and no process was left")
    return int(right != len(rows))


if __name__ == "__main__":
    run(main)
