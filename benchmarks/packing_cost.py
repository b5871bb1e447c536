"""Packing so many lengths: ours, NeMo 2's and Megatron-Bridge's own functions out of their sources, and a plot."""

from __future__ import annotations
import __future__

import ast
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import ROOT

from data_prep.best_fit import best_fit
from nano3.cli import UserError
from nano3.outputs import fresh_file

SEQ = 4096
BRIDGE = ROOT / "build/reference/readers/megatron/bridge/data/packing/algorithms.py"
OURS = "ours"


def lengths(count: int) -> np.ndarray:
    """Lognormal lengths of about 350 tokens, at most `SEQ`, (count,) int64."""
    drawn = np.random.default_rng(0).lognormal(np.log(350) - 0.32, 0.8, count)
    return np.clip(drawn.astype(np.int64), 2, SEQ)


def _ours(drawn: np.ndarray) -> int:
    return len(best_fit(drawn, SEQ, 64, 1234)[1]) - 1


def _definitions(source: Path, *wanted: str) -> dict[str, Any]:
    """Functions and classes of a source, without what it imports; they need NumPy only."""
    body = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", None) in wanted]
    names: dict[str, Any] = {"__name__": source.stem, "np": np}
    flags = __future__.annotations.compiler_flag  # types in signatures are not looked up
    exec(compile(ast.Module(body, type_ignores=[]), str(source), "exec", flags, dont_inherit=True), names)
    return names


def _nemo() -> Callable[[np.ndarray], int]:
    found = importlib.util.find_spec("nemo")
    assert found is not None
    (folder,) = found.submodule_search_locations or []
    source = Path(folder) / "utils" / "sequence_packing_utils.py"
    names = _definitions(source, "first_fit_shuffle", "first_fit", "find_first_bin_that_fits")
    return lambda drawn: len(names["first_fit_shuffle"](drawn.tolist(), SEQ))


def _bridge() -> Callable[[np.ndarray], int]:
    if not BRIDGE.is_file():
        raise UserError(f"no {BRIDGE}; run: make build/reference/readers")
    names = _definitions(BRIDGE, "first_fit_shuffle", "first_fit", "_SegmentTree")
    return lambda drawn: len(names["first_fit_shuffle"](drawn.tolist(), SEQ))


PACKERS = {OURS: lambda: _ours, "nemo": _nemo, "bridge": _bridge}
NAMES = {OURS: "best fit (ours)", "nemo": "NeMo 2", "bridge": "Megatron-Bridge"}


def packing(count: int, packer: str) -> dict[str, Any]:
    """CPU seconds, fullness and peak memory of packing so many documents, in this process."""
    drawn, pack = lengths(count), PACKERS[packer]()
    pack(drawn[:100])  # compiles ours
    begun = time.process_time()
    packs = pack(drawn)
    seconds = time.process_time() - begun
    return {
        "what": f"packing {count:,} documents, {NAMES[packer]}",
        "packer": packer,
        "documents": count,
        "s": round(seconds, 3),
        "full": round(float(drawn.sum()) / packs / SEQ, 4),
        "peak MB": _peak_kib() * 1024 // 10**6,
    }


def _peak_kib() -> int:
    """The most memory that this process has held (VmHWM, proc(5)). getrusage's also counts what its parent held when it
    started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def plot(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draws CPU seconds against documents, both on logarithmic axes, a line for each packer, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for packer, name in NAMES.items():
        points = sorted((row["documents"], row["s"]) for row in rows if row.get("packer") == packer)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="documents", ylabel=f"CPU seconds to pack into {SEQ:,} tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    with fresh_file(out) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
