"""Tier (a): the stand-ins against mamba-ssm's Triton kernels. Torch and Triton suffice.

    python -m tests.gpu.kernels build/reference              # on the GPU: FP32 and BF16, sizes of pico and Nano
    python -m tests.gpu.kernels build/reference --interpret  # tiny, in FP32, on the CPU, in Triton's interpreter

Every case computes outputs and gradients three times: by the original, by the stand-in in the same dtype, and by the
stand-in in FP64, which tests/nano3/test_kernels.py compares with the recurrence token by token.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu.originals import interpret, load
from tests.gpu.record import Row, say, worst

Tensors = dict[str, Tensor]

BOUNDS = {"bfloat16": 3e-2, "float32": 1e-2}
"""Largest error relative to the largest value. BF16 has 8 bits, and gradients pass several roundings; in FP32 the GPU's
kernels multiply in TF32, which has 11 bits."""
INTERPRETED = 1e-5
"""The interpreter multiplies in FP32."""


@dataclass(frozen=True)
class Size:
    """Widths of one Mamba layer and the lengths of the documents in a pack."""

    name: str
    heads: int
    groups: int
    width: int
    state: int
    chunk: int
    lengths: tuple[int, ...]


TINY = (Size("tiny", 4, 2, 16, 16, 32, (5, 1, 30, 40)),)
REAL = (
    Size("pico", 8, 4, 32, 32, 128, (300, 1, 127, 84, 512)),
    Size("Nano", 64, 8, 64, 128, 128, (700, 1, 255, 1092)),
)


def scan_inputs(size: Size) -> Tensors:
    length = sum(size.lengths)
    return {
        "x": torch.randn(1, length, size.heads, size.width),
        "dt": torch.randn(1, length, size.heads),
        "A": -torch.rand(size.heads) * 4,
        "B": torch.randn(1, length, size.groups, size.state),
        "C": torch.randn(1, length, size.groups, size.state),
        "D": torch.randn(size.heads),
        "dt_bias": torch.randn(size.heads) - 2,
    }


def split_inputs(size: Size) -> Tensors:
    inner, length = size.heads * size.width, sum(size.lengths)
    channels = inner + 2 * size.groups * size.state
    return {
        "zxbcdt": torch.randn(1, length, inner + channels + size.heads),
        "conv1d_weight": torch.randn(channels, 4) * 0.5,
        "conv1d_bias": torch.randn(channels) * 0.1,
        "dt_bias": torch.randn(size.heads) - 2,
        "A": -torch.rand(size.heads) * 4,
        "D": torch.randn(size.heads),
    }


def norm_inputs(size: Size) -> Tensors:
    inner, length = size.heads * size.width, sum(size.lengths)
    return {"x": torch.randn(length, inner), "weight": torch.randn(inner), "z": torch.randn(length, inner)}


KEEP_FP32 = ("A", "D", "dt_bias")
"""What megatron-core hands over in FP32 whatever the rest is in."""


@dataclass(frozen=True)
class Case:
    """One function: the original, the stand-in, inputs and options."""

    name: str
    original: Callable[..., Any]
    standin: Callable[..., Any]
    inputs: Callable[[Size], dict[str, Any]]
    options: Callable[[Size, Any], dict[str, Any]]


def cases(folder: str) -> list[Case]:
    """All comparisons; the originals come from `folder`."""
    from nano3.cpu.norm import rmsnorm_fn
    from nano3.cpu.ssd_combined import mamba_chunk_scan_combined
    from nano3.cpu.ssd_split import mamba_split_conv1d_scan_combined

    ssd, norm, _ = load(folder)

    def scan(size: Size, seq_idx: Any) -> dict[str, Any]:
        return {"chunk_size": size.chunk, "dt_softplus": True, "seq_idx": seq_idx}

    def split(size: Size, seq_idx: Any) -> dict[str, Any]:
        shape = {"headdim": size.width, "ngroups": size.groups}
        return {"chunk_size": size.chunk, "seq_idx": seq_idx, "norm_before_gate": False, **shape}

    def gated(size: Size, _: Any) -> dict[str, Any]:
        group = size.heads * size.width // size.groups
        return {"bias": None, "eps": 1e-5, "group_size": group, "norm_before_gate": False}

    return [
        Case("scan", ssd.mamba_chunk_scan_combined, mamba_chunk_scan_combined, scan_inputs, scan),
        Case(
            "split, convolution, scan",
            ssd.mamba_split_conv1d_scan_combined,
            mamba_split_conv1d_scan_combined,
            split_inputs,
            split,
        ),
        Case("gated norm", norm.rmsnorm_fn, rmsnorm_fn, norm_inputs, gated),
    ]


def run(function: Callable[..., Any], inputs: dict[str, Any], options: dict[str, Any], cotangent: Any) -> dict:
    """The output and the gradients of all inputs, in FP64."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    output = function(**leaves, **options)
    output.backward(cotangent.to(output.dtype))
    return {"output": output.detach().double(), **{f"d{name}": leaf.grad.double() for name, leaf in leaves.items()}}


def largest_error(actual: dict[str, Any], expected: dict[str, Any]) -> float:
    """Over output and gradients, each relative to its largest value; NaN where one is not finite."""
    errors = []
    for name, value in expected.items():
        difference = (actual[name] - value).abs().max() / value.abs().max()
        errors.append(float(difference))
    return worst(errors)


def compare(
    loaded: list[Case], sizes: tuple[Size, ...], device: str, dtypes: tuple[str, ...], bound: float | None
) -> Iterator[Row]:
    """A row for the stand-in against the original, in FP32 another for the CPU's own loops, and two for how far each is
    from FP64. No `bound`: `BOUNDS`."""
    for size in sizes:
        seq_idx = torch.repeat_interleave(torch.arange(len(size.lengths)), torch.tensor(size.lengths))[None].int()
        for case in loaded:
            torch.manual_seed(0)
            inputs = {name: value.to(device) for name, value in case.inputs(size).items()}
            options = case.options(size, seq_idx.to(device))
            cotangent = torch.randn_like(case.standin(**inputs, **options))
            for name in dtypes:
                cast = {k: v if k in KEEP_FP32 else v.to(getattr(torch, name)) for k, v in inputs.items()}
                exact = run(case.standin, {k: v.double() for k, v in cast.items()}, options, cotangent)
                original, standin = (run(f, cast, options, cotangent) for f in (case.original, case.standin))
                label = f"{case.name}, {size.name}, {name}"
                yield Row(f"{label}: stand-in against Triton", largest_error(standin, original), bound or BOUNDS[name])
                if name == "float32":
                    # On a CPU compiled loops compute what PyTorch's operations do elsewhere: these are compared too.
                    here = {k: v.cpu() for k, v in cast.items()}
                    loops = run(case.standin, here, case.options(size, seq_idx), cotangent.cpu())
                    error = largest_error(loops, {k: v.cpu() for k, v in original.items()})
                    yield Row(f"{label}: compiled loops of the CPU against Triton", error, bound or BOUNDS[name])
                yield Row(f"{label}: Triton against FP64", largest_error(original, exact))
                yield Row(f"{label}: stand-in against FP64", largest_error(standin, exact))


def forgetting(function: Callable[..., Any], **arguments: Any) -> Any:
    """A stand-in that does not see the documents."""
    return function(**{**arguments, "seq_idx": None} if "seq_idx" in arguments else arguments)


def main() -> int:
    parse = argparse.ArgumentParser(prog="python -m tests.gpu.kernels", description=(__doc__ or "").split("\n")[0])
    parse.add_argument("folder", type=Path, help="what `make build/reference` filled")
    parse.add_argument("--interpret", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    parse.add_argument("--fault", action="store_true", help="forget the documents in the stand-ins: rows must fail")
    args = parse.parse_args()
    settings: tuple = (REAL, "cuda", ("float32", "bfloat16"), None)
    if args.interpret:
        interpret()
        settings = (TINY, "cpu", ("float32",), INTERPRETED)
    loaded = cases(os.fspath(args.folder))
    if args.fault:
        loaded = [replace(case, standin=partial(forgetting, case.standin)) for case in loaded]
    holds = True
    for row in compare(loaded, *settings):
        say(row)
        holds = holds and row.holds
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
