"""How fast are conversion, merge and FP8 against `cp`, and how much memory do they take? On Nano's real shapes.

    python benchmarks/bench_conversion.py --layers 7 14 --folder runs/bench --out runs/bench_conversion.json

Makes a random model of Nano's first N layers, then runs every tool as a user would, in a process of its own: start,
hashes, certificate and fsync included, inputs not in the page cache. Just before each, `cp -r` of the same input with
fsync is timed. After the round trip the files are compared byte for byte. Disk: up
to twice the model (9.5 GB at 7 layers, 17 GB at 14, 63 GB at 52), memory: 3 GB; --connector takes twice its model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from results import ROOT, conditions, save

from nano3.arch import resolve_model
from nano3.cli import UserError, run
from nano3.file_digests import file_sha256

BOUNDS = {"HF -> NeMo": 0.5, "NeMo -> HF": 0.5, "merge, attention only": 0.5, "merge, all targets": 0.2, "FP8": 0.15}
"""Least ratio to `cp`. A merge of attention adapters copies nearly everything, one of all targets changes it."""
MOST_RSS = 3e9


@dataclass(frozen=True)
class Taken:
    """What one process took: bytes of its input, seconds, the most resident memory of it and its children, and how
    many processes wanted a core in the last minute."""

    size: int
    seconds: float
    rss: int
    load: float
    cp_seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Speed over that of `cp`."""
        return self.cp_seconds / self.seconds


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("--layers", type=int, nargs="+", default=(7, 14), help="layers (default: %(default)s)")
    parse.add_argument("--model", default="nano", help="whose config.json gives the shapes (default: %(default)s)")
    parse.add_argument(
        "--connector", type=int, default=2, help="layers of the whole-model comparison, 0 for none (default: 2, 4 GB)"
    )
    parse.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where to work (default: %(default)s)")
    parse.add_argument("--out", type=Path, help="JSON file to write")
    return parse


def files_of(path: Path) -> list[Path]:
    """All files of a folder."""
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def evict(path: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def weight_bytes(path: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in files_of(path) if file.suffix in (".safetensors", ".distcp"))


def copied(source: Path, target: Path) -> float:
    """Seconds of `cp -r` with fsync, the source not in the page cache."""
    evict(source)
    begin = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in files_of(target):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - begin
    shutil.rmtree(target)
    return seconds


def _tree_rss(pid: int) -> int:
    """Resident bytes of a process and all its descendants."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except OSError:
        return 0
    return own + sum(_tree_rss(int(child)) for child in children)


@contextmanager
def _watch(pid: int) -> Iterator[list[int]]:
    """Looks at the memory of a process tree 20 times a second."""
    seen, stop = [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            seen[0] = max(seen[0], _tree_rss(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def taken(command: list[str], source: Path) -> Taken:
    """Runs a Python script of this repository on a source that is not in the page cache."""
    evict(source)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    with _watch(process.pid) as seen:
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - begin
    if process.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {process.returncode}; its message is above")
    return Taken(weight_bytes(source), seconds, max(seen[0], usage.ru_maxrss * 1024), os.getloadavg()[0])


def beside_cp(command: list[str], source: Path, scratch: Path) -> Taken:
    """The same after a timed copy of the source."""
    seconds = copied(source, scratch)
    return replace(taken(command, source), cp_seconds=seconds)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file, its index and config.json."""
    found = {}
    for path in files_of(folder):
        if path.suffix == ".safetensors" or path.name in ("config.json", "model.safetensors.index.json"):
            found[str(path.relative_to(folder))] = file_sha256(path)
    return found


def measure(folder: Path, config: dict[str, Any], layers: int) -> Iterator[tuple[str, Taken]]:
    """All tools at one size, by name. Raises `UserError` when the round trip does not give every file back."""
    from conversion_inputs import shortened, write_adapter, write_model

    config = shortened(config, layers)
    model, nemo, out, scratch = (folder / name for name in ("model", "nemo", "out", "copy"))
    write_model(model, config)
    original = hashes(model)
    yield "HF -> NeMo", beside_cp(["conversion/hf_to_nemo.py", "--no-context", str(model), str(nemo)], model, scratch)
    shutil.rmtree(model)  # room for what comes back: the same, or the benchmark ends here
    yield "NeMo -> HF", beside_cp(["conversion/nemo_to_hf.py", str(nemo), str(model)], nemo, scratch)
    shutil.rmtree(nemo)
    if hashes(model) != original:
        raise UserError("the round trip did not give the same files back: this is a bug, report it")
    for preset, name in (("attention", "merge, attention only"), ("all", "merge, all targets")):
        adapter = write_adapter(folder / "adapter", config, preset)
        command = ["conversion/merge_lora.py", str(model), str(adapter), str(out)]
        yield name, beside_cp(command, model, scratch)
        shutil.rmtree(out)
    yield "FP8", beside_cp(["benchmarks/conversion_fp8.py", str(model), str(out)], model, scratch)
    for path in (model, out, folder / "adapter"):
        shutil.rmtree(path)


def compare(folder: Path, config: dict[str, Any], layers: int) -> Iterator[tuple[str, Taken]]:
    """HF -> NeMo beside the pattern that holds two whole models in memory."""
    from conversion_inputs import shortened, write_model

    model, out = folder / "model", folder / "out"
    size = write_model(model, shortened(config, layers))
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(f"connector pattern on {size / 1e9:.1f} GB, {available / 1e9:.0f} GB of memory are free", file=sys.stderr)
    for name, command in (
        ("whole model in memory", ["benchmarks/conversion_connector.py"]),
        ("streaming", ["conversion/hf_to_nemo.py", "--no-context"]),
    ):
        yield name, taken([*command, str(model), str(out)], model)
        shutil.rmtree(out)
    shutil.rmtree(model)


COLUMNS = ("layers", "GB", "step", "GB/s", "`cp`, GB/s", "ratio to `cp`", "bound", "peak RSS, GB", "load")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(layers: int, name: str, row: Taken) -> str:
    """One line of the Markdown table."""
    size, bound = row.size / 1e9, BOUNDS[name]
    missed = " (missed)" * (row.ratio < bound) + " (too much memory)" * (row.rss > MOST_RSS)
    return (
        f"| {layers} | {size:.2f} | {name} | {size / row.seconds:.2f} | {size / row.cp_seconds:.2f} "
        f"| {row.ratio:.2f}{missed} | {bound} | {row.rss / 1e9:.2f} | {row.load:.0f} |"
    )


def main() -> int:
    args = parser().parse_args()
    config = json.loads((resolve_model(args.model) / "config.json").read_text())
    pattern = config["hybrid_override_pattern"]
    if min(args.layers) <= pattern.index("*") or max(args.layers) > len(pattern) or args.connector > len(pattern):
        raise UserError(
            f"--layers must be {pattern.index('*') + 1} (the first with attention) to {len(pattern)} for {args.model}"
        )
    facts = {"command": " ".join(sys.argv), **conditions(), "torch": version("torch")}
    print(json.dumps(facts), HEAD, sep="\n", flush=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="conversion-", dir=args.folder.resolve()))  # removed at the end
    rows: list[dict[str, Any]] = []
    try:
        for layers in args.layers:
            print(f"{layers} layers ...", file=sys.stderr, flush=True)
            for name, row in measure(folder, config, layers):
                print(line(layers, name, row), flush=True)
                rows.append({"layers": layers, "step": name, **asdict(row), "ratio": row.ratio})
        for name, row in compare(folder, config, args.connector) if args.connector else ():
            size = row.size / 1e9
            print(f"{args.connector} layers, {size:.2f} GB, {name}: {size / row.seconds:.2f} GB/s, "
                  f"peak RSS {row.rss / 1e9:.2f} GB", flush=True)  # fmt: skip
            rows.append({"layers": args.connector, "step": name, **asdict(row)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    save(args.out, facts, rows)
    return 0


if __name__ == "__main__":
    run(main)
