"""Kills a preparation at random moments of its shards, its join and its packing, and compares all bytes.

    python benchmarks/kill_preparation.py FOLDER [--workers 1 3] [--moments 10] [--rows 20000] [--seed 0]

Where the preparation stands is read off its folder: a part is being written, all parts are there, or the store has its
manifest. At a moment drawn within that phase one process of the command gets SIGKILL. Then no process may be left, the
same command must end with the same bytes, no finished part may be written again, at most one shard for each process
may have been begun in vain, and nothing but the store may lie in the folder. Exit code 1 when a moment did not recover.
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
from pathlib import Path
from typing import Any

from kill_series import LONGEST_SECONDS, RESULTS, VARIABLE, differences, left_over
from results import ROOT, conditions

from launch.guard import processes_of
from launch.local import die_with_parent
from nano3.cli import UserError, run
from nano3.rows import write_rows
from nano3.store_parts import finished_parts
from nano3.token_store import MANIFEST, unfinished_folder

SHARDS = 10
LOOK_SECONDS = 0.002
WORDS = ("one", "two", "three", "four", "five", "six", "red", "green", "blue", "black", "white", "north", "south")


def make_rows(path: Path, rows: int) -> None:
    """Short conversations of drawn words, no two alike."""
    drawn = random.Random(0)
    talks = ((" ".join(drawn.choices(WORDS, k=12)), " ".join(drawn.choices(WORDS, k=8))) for _ in range(rows))
    write_rows(
        path,
        (
            {
                "id": str(number),
                "source": f"s{number % 3}",
                "messages": [
                    {"role": "user", "content": f"{number}. {asked}"},
                    {"role": "assistant", "content": answered},
                ],
            }
            for number, (asked, answered) in enumerate(talks)
        ),
    )


def start(folder: Path, out: Path, rows: int, workers: int) -> subprocess.Popen[bytes]:
    """The command, in a session of its own."""
    words = ["--input", folder / "rows.jsonl", "--tokenizer", "pico", "--seq-length", 1024, "--out", out]
    words += ["--workers", workers, "--shard-rows", rows // SHARDS]
    with (folder / "log").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "data_prep" / "prepare.py"), *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "NANO3_CACHE": str(folder / "cache"), VARIABLE: str(folder)},
            start_new_session=True, preexec_fn=die_with_parent, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        )  # fmt: skip


def began(work: Path) -> dict[str, Callable[[], bool]]:
    """For each phase, whether it has begun in the unfinished folder `work`."""
    return {
        "shard": lambda: any(work.glob("part-*.partial-*")),
        "join": lambda: len(finished_parts(work)) == SHARDS,
        "packing": lambda: (work / "store" / MANIFEST).exists(),
    }


def undisturbed(folder: Path, rows: int) -> dict[str, float]:
    """Makes the store that the others must equal; the seconds that each phase took."""
    out, work = folder / "work" / "store", unfinished_folder(folder / "work" / "store")
    shutil.rmtree(folder / "work", ignore_errors=True)
    shutil.rmtree(folder / "reference", ignore_errors=True)
    out.parent.mkdir()
    process, starts = start(folder, out, rows, 1), dict[str, float]()
    while process.poll() is None:
        for phase, holds in began(work).items():
            if phase not in starts and holds():
                starts[phase] = time.monotonic()
        time.sleep(LOOK_SECONDS)
    if process.returncode:
        raise UserError(f"prepare.py fails without being killed; the reason stands in {folder / 'log'}")
    os.rename(out, folder / "reference")
    ends = [*list(starts.values())[1:], time.monotonic()]
    return {phase: end - begun for (phase, begun), end in zip(starts.items(), ends, strict=True)}


def attempt(folder: Path, rows: int, workers: int, phase: str, moment: float, drawn: random.Random) -> dict[str, Any]:
    """One kill, `moment` seconds into a phase, and what was wrong afterwards."""
    out, work = folder / "work" / "store", unfinished_folder(folder / "work" / "store")
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    process, holds = start(folder, out, rows, workers), began(work)[phase]
    while process.poll() is None and not holds():
        time.sleep(LOOK_SECONDS)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    alive = processes_of(str(folder), VARIABLE)
    with suppress(ProcessLookupError):
        if alive:
            os.kill(drawn.choice(alive), signal.SIGKILL)
    process.wait(LONGEST_SECONDS)
    problems = left_over(folder)
    parts = {(work / f"part-{number:05}" / "tokens.bin").stat().st_ino for number in finished_parts(work)}
    in_vain = len([*work.glob("part-*.partial-*")])
    if in_vain > workers:
        problems.append(f"{in_vain} shards were begun in vain")
    again = start(folder, out, rows, workers)
    if again.wait(LONGEST_SECONDS):
        problems.append("the same command failed")
    problems += left_over(folder) + differences(out, folder / "reference")
    if parts - {path.stat().st_ino for path in out.rglob("tokens.bin")}:
        problems.append("a finished part was written again")
    problems += [f"left: {path.name}" for path in out.parent.iterdir() if path != out]
    return {
        "workers": workers,
        "phase": phase,
        "moment": round(moment, 3),
        "killed": bool(alive),
        "finished parts": len(parts),
        "shards in vain": in_vain,
        "wrong": problems,
    }


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("folder", metavar="FOLDER", type=Path, help="for inputs, stores and results.jsonl; they stay")
    parse.add_argument("--workers", nargs="+", type=int, default=[1, 3], help="processes (default: 1 3)")
    parse.add_argument("--moments", type=int, default=10, help="kills in each phase (default: 10)")
    parse.add_argument("--rows", type=int, default=20_000, help=f"in {SHARDS} shards (default: 20000)")
    parse.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parse.parse_args()
    if args.rows < SHARDS or args.rows % SHARDS or args.moments < 1:
        raise UserError(f"--rows {args.rows} must be a multiple of {SHARDS}, and --moments at least 1")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_rows(folder / "rows.jsonl", args.rows)
    lasts, rows = undisturbed(folder, args.rows), []
    for workers in args.workers:
        for phase, seconds in lasts.items():
            for number in range(args.moments):
                drawn = random.Random(f"{args.seed} {workers} {phase} {number}")
                row = attempt(folder, args.rows, workers, phase, drawn.uniform(0, seconds), drawn)
                rows.append(row)
                with (folder / RESULTS).open("a") as results:
                    results.write(json.dumps(conditions() | row) + "\n")
                print(f"{workers} {phase} {number + 1}/{args.moments}: {row}", flush=True)
    right = sum(not row["wrong"] for row in rows)
    most = max(row["shards in vain"] for row in rows)
    print(f"{right} of {len(rows)} recovered with equal bytes; at most {most} shards were begun in vain")
    return int(right != len(rows))


if __name__ == "__main__":
    run(main)
