"""Runs mamba-ssm's own GPU kernels on a CPU, by Triton's interpreter, and writes their outputs and gradients to a file.

    python -m tests.helpers.triton_reference build/reference OUT.pt

A process of its own: Triton reads TRITON_INTERPRET when it is imported, and the stand-ins must not be near.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.gpu.originals import interpret, load


def run(function: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """One case: inputs, options, outputs, the outputs' cotangents and the inputs' gradients."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = tuple(torch.randn_like(o) for o in outputs)
    torch.autograd.backward(outputs, cotangents)
    return {
        "inputs": inputs,
        "options": options,
        "outputs": tuple(o.detach() for o in outputs),
        "cotangents": cotangents,
        "gradients": {name: leaf.grad for name, leaf in leaves.items()},
    }


def scan_case(ssd: Any, heads: int, groups: int, seq_idx: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    length, p, n = seq_idx.shape[1], 16, 16
    inputs = {
        "x": torch.randn(1, length, heads, p),
        "dt": torch.randn(1, length, heads),
        "A": -torch.rand(heads) * 4,
        "B": torch.randn(1, length, groups, n),
        "C": torch.randn(1, length, groups, n),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads) - 2,
        "z": torch.randn(1, length, heads, p),
        "initial_states": torch.randn(1, heads, p, n),
    }
    options = {"chunk_size": 32, "dt_softplus": True, "return_final_states": True, "seq_idx": seq_idx, **options}
    return run(ssd.mamba_chunk_scan_combined, inputs, options)


def split_case(ssd: Any, heads: int, groups: int, seq_idx: torch.Tensor) -> dict[str, Any]:
    length, p, n = seq_idx.shape[1], 16, 16
    channels = heads * p + 2 * groups * n
    inputs = {
        "zxbcdt": torch.randn(1, length, heads * p + channels + heads),
        "conv1d_weight": torch.randn(channels, 4) * 0.5,
        "conv1d_bias": torch.randn(channels) * 0.1,
        "dt_bias": torch.randn(heads) - 2,
        "A": -torch.rand(heads) * 4,
        "D": torch.randn(heads),
    }
    options = {"chunk_size": 32, "seq_idx": seq_idx, "headdim": p, "ngroups": groups, "norm_before_gate": False}
    return run(ssd.mamba_split_conv1d_scan_combined, inputs, options)


def norm_case(norm: Any, before_gate: bool) -> dict[str, Any]:
    inputs = {"x": torch.randn(7, 64), "weight": torch.randn(64), "z": torch.randn(7, 64)}
    options = {"bias": None, "eps": 1e-5, "group_size": 16, "norm_before_gate": before_gate}
    return run(norm.rmsnorm_fn, inputs, options)


def documents(*lengths: int) -> torch.Tensor:
    """seq_idx (1, sum of lengths)."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()


def main() -> None:
    folder, out = sys.argv[1:]
    interpret()
    ssd, norm, _ = load(folder)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = {
        "scan, one document": scan_case(ssd, 2, 1, documents(64), {}),
        "scan, documents": scan_case(ssd, 4, 2, documents(20, 1, 11, 17, 21), {}),
        "split, documents": split_case(ssd, 4, 2, documents(5, 1, 30, 40)),
        "norm, gate first": norm_case(norm, False),
        "norm, gate last": norm_case(norm, True),
    }
    torch.save(cases, out)


if __name__ == "__main__":
    main()
