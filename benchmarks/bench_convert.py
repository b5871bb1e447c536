"""How much memory convert.py takes for a large CSV file, with questions held out and without.

    python benchmarks/bench_convert.py FOLDER [--mb 1000] [--held-out 500] [--out runs/bench_convert.json]

FOLDER gets a file of multiple-choice questions put together from a few thousand words, and what is made of it.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import ROOT, conditions, save

from nano3.cli import run

WORDS = 5000
COLUMNS = ("question", "opa", "opb", "opc", "opd", "right", "why")
MAPS = ("user={question}\nA. {opa}\nB. {opb}\nC. {opc}\nD. {opd}", "assistant={right}", "reasoning={why}")


def write_csv(path: Path, size: int) -> int:
    """Questions of some 25 words with four options and an explanation of 60, `size` bytes; returns their number."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 10))) for _ in range(WORDS)]
    rows = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        while rows % 1000 or file.tell() < size:
            texts = [" ".join(draw.choices(words, k=count)) for count in (25, 4, 4, 4, 4, 60)]
            out.writerow([*texts[:5], draw.choice("ABCD"), texts[5]])
            rows += 1
    return rows


def measured(command: list[str]) -> dict[str, Any]:
    """Seconds, CPU seconds and largest resident memory of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1000, 1),
    }


def main() -> int:
    """Makes the file, converts it both ways and prints what that took."""
    parser = argparse.ArgumentParser(description="Memory that converting a large CSV file takes.")
    parser.add_argument("folder", type=Path, help="for the file and what is made of it; three times its size")
    parser.add_argument("--mb", default=1000, type=int, help="millions of bytes of the file")
    parser.add_argument("--held-out", default=500, type=int, help="questions held out in the second conversion")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, facts, results = args.folder / "questions.csv", conditions(), []
    count = write_csv(source, args.mb * 10**6)
    maps = [word for text in MAPS for word in ("--map", text)]
    for held_out in (0, args.held_out):
        command = [sys.executable, "data_prep/convert.py", str(source), "--out", str(args.folder / "rows.jsonl"), *maps]
        row = {"rows": count, "bytes": source.stat().st_size, "held_out": held_out}
        results.append(row | measured([*command, "--held-out", str(held_out)]))
        print(results[-1])
    save(args.out, facts, results)
    return 0


if __name__ == "__main__":
    run(main)
