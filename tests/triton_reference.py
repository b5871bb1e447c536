"""Runs mamba-ssm's own GPU kernels on a CPU, by Triton's interpreter, and writes their outputs and gradients to a file.

    python tests/triton_reference.py build/reference OUT.pt

A process of its own: Triton reads TRITON_INTERPRET when it is imported, and the stand-ins must not be near. The
convolution of causal-conv1d is CUDA C++ and cannot run here, so its package's own Python reference takes its place.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton


class FirstConfig:
    """Stands for Triton's autotuner, which asks a GPU driver for timings: takes the first configuration.

    Its `pre_hook` must run: it zeroes the buffers that kernels add into.
    """

    def __init__(self, kernel: Any, configs: list[Any]) -> None:
        self.kernel, self.configs, self.best_config = kernel, configs, configs[0]  # read by mamba-ssm
        inner = kernel
        while not hasattr(inner, "arg_names"):
            inner = inner.fn
        self.arg_names = inner.arg_names

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            options = {**options, **self.best_config.kwargs}
            if self.best_config.pre_hook:
                self.best_config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **options})
            return self.kernel[grid](*args, **options)

        return launch


def without_gpu() -> None:
    """What the kernels' Python wrappers ask of a GPU before they launch."""
    triton.autotune = lambda configs, **_: lambda kernel: FirstConfig(kernel, configs)
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]
    properties = types.SimpleNamespace(multi_processor_count=4, major=9, minor=0)
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment]


def load(folder: str) -> tuple[Any, Any]:
    """mamba-ssm's `ssd_combined` and `layernorm_gated` from `folder`, without the CUDA extensions of its __init__."""
    sys.path.insert(0, folder)
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [os.path.join(folder, "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    sys.modules["causal_conv1d_cuda"] = types.ModuleType("causal_conv1d_cuda")
    reference = importlib.import_module("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    ssd = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")

    def forward(x: Any, weight: Any, bias: Any, seq_idx: Any, initial: Any, _final: Any, silu: bool) -> Any:
        assert initial is None
        return reference(x, weight, bias, seq_idx=seq_idx, activation="silu" if silu else None)

    def backward(
        x: Any,
        weight: Any,
        bias: Any,
        dout: Any,
        seq_idx: Any,
        initial: Any,
        _dfinal: Any,
        dx: Any,
        _: bool,
        silu: bool,
    ) -> Any:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with torch.enable_grad():
            out = forward(*leaves, seq_idx, initial, None, silu)
        grads = torch.autograd.grad(out, leaves, dout)
        dx.copy_(grads[0])
        return dx, grads[1], grads[2], None

    ssd.causal_conv1d_fwd_function, ssd.causal_conv1d_bwd_function = forward, backward
    return ssd, importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")


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
    without_gpu()
    ssd, norm = load(os.path.abspath(folder))
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
