"""Compares parallel layouts with one process, on CPU ranks.

    python -m nano3.parity                                # all layouts, FP64 and FP32
    python -m nano3.parity tp2.ep2 cp4 --precision fp64   # some of them, in one precision

A layout is sizes of tp, pp, cp, ep, etp and dp; ranks that they leave are data parallel. `tp2.ep2@M-*E` has a layer
pattern of its own, `tp2.ep2+each` an adapter for each expert (others: `+dora`, `+gated` from a mark on, `+allgather`,
`+distributed` optimizer, `+recompute` of some parts of a layer, `+full` recomputation, `+chunked`: the loss 20
positions at a time, `+nf4`: a frozen base in 4 bits). `nf4` alone stands for 16 layouts with such a base. Prints a
table, writes parity.json, and exits with 1 if anything is beyond its bound (nano3/parity/comparison.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from nano3.cli import run as run_script
from nano3.outputs import fresh_file


def arguments() -> argparse.Namespace:
    parse = argparse.ArgumentParser(prog="python -m nano3.parity", description=(__doc__ or "").split("\n")[0])
    parse.add_argument("layouts", nargs="*", metavar="LAYOUT", help="for example tp2.ep2; default: all")
    parse.add_argument("--precision", choices=["fp64", "fp32"], nargs="+", default=["fp64", "fp32"])
    parse.add_argument("--out", type=Path, default=Path("parity.json"), help="where the table goes as JSON")
    return parse.parse_args()


def main() -> int:
    args = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    from nano3.parity.layouts import (
        LAYOUTS,
        NF4_LAYOUTS,
        parse_layouts,
    )  # imports torch: not before warnings are silenced

    wanted = parse_layouts(NF4_LAYOUTS if args.layouts == ["nf4"] else args.layouts or LAYOUTS)
    print("importing NeMo and Megatron-Core, once for all ranks ...", file=sys.stderr, flush=True)
    from nano3.quiet import quiet, quiet_imports

    with quiet_imports():
        from nano3.parity import comparison
        from nano3.parity.suite import run_suite
    quiet()
    print(f"imported in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(comparison.HEADER, flush=True)
    rows = []
    for row in run_suite(wanted, args.precision):
        print(comparison.line(row), flush=True)
        rows.append(row)
    beyond = [row for row in rows if not row.holds]
    seconds = time.perf_counter() - started
    with fresh_file(args.out) as path:
        result = {"rows": [comparison.as_json(row) for row in rows], "seconds": seconds, "holds": not beyond}
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows) - len(beyond)} of {len(rows)} hold, {seconds:.0f} s; {args.out}")
    return 1 if beyond else 0


if __name__ == "__main__":
    run_script(main)
