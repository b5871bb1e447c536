"""`make gpu-check`: what can be checked of this repository on a machine with GPUs, tier by tier.

    python -m tests.gpu_check                                # all tiers that this machine can run
    python -m tests.gpu_check --tiers a                      # torch and Triton suffice
    python -m tests.gpu_check --nano FOLDER --data STORE     # tier c ends with tokens a second of the real model

Before, where there is a network: `make build/reference` (4 MB), and take the checkout along with it: nothing is fetched
or compiled by pip here. Writes runs/gpu-check.md and .json, to be pasted into docs/gpu.md. Exit code 0: what could
run passed, and the last line says which tiers those are; 1: something failed, or nothing could run; 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.gpu.record import ROOT, Row, Tier, as_json, markdown, rows_from

REFERENCE = ROOT / "build" / "reference"
STACK = ("megatron.core", "nemo", "transformer_engine", "mamba_ssm", "causal_conv1d")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="python -m tests.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("--tiers", default="abc", help="which, for example ab (default: abc)")
    parse.add_argument("--nano", help="folder of the real model, for tokens a second in tier c")
    parse.add_argument("--data", help="token store with packs of 4096 for it")
    parse.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu-check", help="name of the record, without its ending"
    )
    return parse


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )  # fmt: skip


def _missing(modules: tuple[str, ...]) -> list[str]:
    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return [name for name in modules if not found(name)]


def kernels(tier: Tier) -> None:
    """Tier (a)."""
    if missing := _missing(("triton",)):
        return tier.skip(f"no {missing[0]} in {sys.executable}")
    if not (REFERENCE / "mamba_ssm").is_dir():
        return tier.skip(f"no {REFERENCE}: run `make build/reference` where there is a network, and bring the folder")
    done = _run("tests.gpu.kernels", str(REFERENCE))
    tier.rows = rows_from(done.stdout)
    if not _missing(("pytest",)):
        recurrence = _run("pytest", "-q", "-p", "no:cacheprovider", "tests/nano3/test_kernels.py", "-k", "cuda")
        tier.rows.append(Row("tests/nano3/test_kernels.py on CUDA tensors", recurrence.returncode, 0, "(exit code)"))
    tier.judge()
    if done.returncode and tier.state == "passed":
        tier.fail(done.stderr.strip()[-1500:])
    return None


def stack(tier: Tier) -> None:
    """Tier (b)."""
    from tests.gpu.layouts import qlora, qwen3_qlora

    if missing := _missing(STACK):
        return tier.skip(f"not installed: {', '.join(missing)} (requirements-gpu.txt)")
    with tempfile.TemporaryDirectory() as name:
        tier.rows = [*stack_rows(Path(name), gpu="0"), *qlora(Path(name), local=False)]
        if not _missing(("peft", "bitsandbytes")):
            tier.rows += qwen3_qlora(Path(name) / "qwen3")
    tier.judge()
    return None


def stack_rows(folder: Path, gpu: str) -> list:
    """Tier (b)'s rows; `gpu` is NANO3_CPU of the process that stands on trial."""
    convert = subprocess.run(
        [sys.executable, "conversion/hf_to_nemo.py", "pico", str(folder / "base")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NANO3_CPU": "1"},
    )  # fmt: skip
    if convert.returncode:
        raise RuntimeError(convert.stderr[-1500:])
    files = []
    for where, precision in (("1", "fp32"), ("1", "bf16"), (gpu, "bf16")):
        files.append(folder / f"{len(files)}.pt")
        done = _run("tests.gpu.stack", str(folder / "base"), str(files[-1]), precision, NANO3_CPU=where)
        if done.returncode:
            raise RuntimeError(f"{'stand-ins' if where == '1' else 'GPU'}, {precision}: {done.stderr[-1500:]}")
    from tests.gpu.distance import compare

    return [*compare(*files), partition_row(gpu), *nf4_rows(gpu)]


def partition_row(gpu: str) -> Row:
    """How context-parallel ranks share a pack: Transformer Engine's rule and ours."""
    done = _run("tests.gpu.partition", NANO3_CPU=gpu)
    if done.returncode:
        raise RuntimeError(f"context-parallel positions: {done.stderr[-1500:]}")
    wrong, total = map(int, done.stdout.splitlines()[-1].split())
    return Row(f"context-parallel positions, of {total}", wrong, 0, "that differ from Transformer Engine's")


def nf4_rows(gpu: str) -> list[Row]:
    """Quantizing and dequantizing on the device."""
    done = _run("tests.gpu.nf4", NANO3_CPU=gpu)
    if done.returncode:
        raise RuntimeError(f"NF4: {done.stderr[-1500:]}")
    return rows_from(done.stdout)


def layouts(tier: Tier, nano: str | None, data: str | None) -> None:
    """Tier (c)."""
    import torch

    if missing := _missing(STACK):
        return tier.skip(f"not installed: {', '.join(missing)} (requirements-gpu.txt)")
    if torch.cuda.device_count() < 8:
        return tier.skip(f"this machine has {torch.cuda.device_count()} GPUs")
    from tests.gpu.layouts import compare, speed

    with tempfile.TemporaryDirectory() as name:
        tier.rows = compare(Path(name), 8)
        if nano and data:
            tier.rows += speed(Path(name), nano, data, 8)
    tier.judge()
    if not (nano and data) and tier.state == "passed":
        tier.reason = "without tokens a second: give --nano and --data"
    return None


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        import torch
    except ImportError:
        print(f"error: no torch in {sys.executable}; name the container's: make gpu-check GPU_PYTHON=...")
        return 2
    if not torch.cuda.is_available():
        print(f"no CUDA device (torch {torch.__version__}, {sys.executable}): nothing was checked")
        return 2
    machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    tiers = run_tiers(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((".md", markdown(tiers, machine)), (".json", as_json(tiers, machine))):
        args.out.with_suffix(path).write_text(text)
    print(markdown(tiers, machine))
    ran = [tier.name.split(":")[0] for tier in tiers if tier.state == "passed"]
    failed = [tier.name.split(":")[0] for tier in tiers if tier.state == "failed"]
    print(f"passed: {', '.join(ran) or 'none'}; failed: {', '.join(failed) or 'none'}; record: {args.out}.md")
    return 1 if failed or not ran else 0


def run_tiers(args: argparse.Namespace) -> list[Tier]:
    """All tiers in order; an error inside one is its failure."""
    known: dict[str, tuple[str, str, Callable[[Tier], None]]] = {
        "a": ("a: kernels", "torch, Triton and build/reference", kernels),
        "b": ("b: pico on one GPU", "Megatron-Core, NeMo, Transformer Engine, mamba-ssm, causal-conv1d", stack),
        "c": (
            "c: layouts and speed",
            "what b needs, and 8 GPUs",
            lambda tier: layouts(tier, args.nano, args.data),
        ),
    }
    tiers = []
    for letter in args.tiers:
        name, needs, check = known[letter]
        tiers.append(Tier(name, needs))
        print(f"tier {name} ...", file=sys.stderr, flush=True)
        try:
            check(tiers[-1])
        except Exception as error:  # a tier that breaks must not hide what the others say
            tiers[-1].fail(f"{type(error).__name__}: {error}")
    return tiers


if __name__ == "__main__":
    sys.exit(main())
