"""Loads mamba-ssm's Triton kernels from the folder that `make build/reference` fills, without what pip must compile.

On a GPU they are compiled by Triton; with `interpret` they run on CPU tensors in Triton's interpreter. causal-conv1d's
kernel is CUDA C++: its package's own Python reference takes its place.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from typing import Any

import torch


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


def interpret() -> None:
    """Triton's interpreter, and what the kernels' Python wrappers ask of a GPU before they launch.

    Call it before Triton is imported anywhere: it reads its variable then.
    """
    assert "triton" not in sys.modules, "Triton was imported before it was told to interpret"
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.autotune = lambda configs, **_: lambda kernel: FirstConfig(kernel, configs)
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]
    properties = types.SimpleNamespace(multi_processor_count=4, major=9, minor=0)
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment]


def load(folder: str) -> tuple[Any, Any, Any]:
    """`ssd_combined` and `layernorm_gated` of mamba-ssm and the reference convolution of causal-conv1d.

    Their packages' __init__ files, which import CUDA extensions, are passed over.
    """
    sys.path.append(os.path.abspath(folder))  # behind what is installed: einops and packaging may be there too
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [os.path.join(os.path.abspath(folder), "mamba_ssm")]
    conv = types.ModuleType("causal_conv1d")
    conv.__path__ = [os.path.join(os.path.abspath(folder), "causal_conv1d")]
    conv.causal_conv1d_fn = None  # type: ignore[attr-defined]  # only looked for
    sys.modules.update({"mamba_ssm": package, "causal_conv1d": conv})
    sys.modules["causal_conv1d_cuda"] = types.ModuleType("causal_conv1d_cuda")
    reference = importlib.import_module("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    ssd = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    _convolve_by(reference, ssd)
    return ssd, importlib.import_module("mamba_ssm.ops.triton.layernorm_gated"), reference


def _convolve_by(reference: Any, ssd: Any) -> None:
    """Has mamba-ssm's `ssd_combined` call the Python reference where it would call the CUDA kernel."""

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
