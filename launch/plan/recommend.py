"""Prints the table of layouts to start with, by hardware, nodes and tokens of a pack, as docs/launch.md has it.

python launch/plan/recommend.py [h100 ...]
"""

from __future__ import annotations

try:
    from nano3.cli import run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse

from launch.plan.hardware import GIB, HARDWARE, Gpu, find_gpu
from launch.plan.layout import Layout
from launch.plan.search import recommend
from nano3.arch import Arch, resolve_model

LENGTHS = (4096, 8192, 32768, 131072, 262144)
"""Tokens of a pack. The model was made for 262,144 at most."""


def row(arch: Arch, gpu: Gpu, gpus: int) -> str:
    """One line of the table, for so many GPUs."""
    cells = []
    for length in LENGTHS:
        best = recommend(arch, gpu, gpus // gpu.gpus_per_node, length)
        if best is None:
            cells.append("-")
            continue
        sizes = best.plan.layout.settings(Layout()).replace("layout.", "")
        recompute = "+".join(best.plan.train.recompute)
        used = best.memory.tightest.total / GIB / gpu.memory_gib
        cells.append(f"{sizes}{f', recompute {recompute}' if recompute else ''} ({used:.0%})")
    return f"| {gpu.name} | {gpus} | " + " | ".join(cells) + " |"


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("hardware", nargs="*", help="names of GPUs (default: all that come as a system)")
    arch = Arch.load(resolve_model("nano"))
    for name in parse.parse_args().hardware or [name for name, gpu in HARDWARE.items() if gpu.gpus_per_node > 1]:
        for gpus in (8, 16):
            print(row(arch, find_gpu(name), gpus))


if __name__ == "__main__":
    run(main)
