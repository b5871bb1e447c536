"""The CPU backend: Megatron-Core and NeMo unchanged, only the leaves replaced.

`enable()` must run before `megatron` or `nemo` is imported. It installs stand-ins for `transformer_engine`,
`mamba_ssm` and `causal_conv1d`, and sends requests for a CUDA device to the CPU. It acts only where there is no CUDA
device, or when NANO3_CPU=1 asks for it; on a GPU machine the real libraries run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_enabled = False


def wanted() -> bool:
    """True where the CPU backend runs: NANO3_CPU=1, or no CUDA device (NANO3_CPU=0 forbids it)."""
    asked = os.environ.get("NANO3_CPU")
    if asked is not None:
        return asked == "1"
    import torch

    return not torch.cuda.is_available()


def enabled() -> bool:
    """Whether this process runs on the CPU backend."""
    return _enabled


def enable() -> bool:
    """Switches the CPU backend on where it is wanted, once; says so on rank 0. Returns whether it is on."""
    global _enabled
    if _enabled or not wanted():
        return _enabled
    if any(name == "megatron.core" or name.startswith("nemo.") for name in sys.modules):
        raise RuntimeError("nano3.cpu.enable() must run before megatron or nemo is imported")
    # There is no compiler's gain on these sizes, and torch.compile cannot trace through the wrapped factories.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from nano3.cpu import cross_entropy, cuda, mamba_standin, megatron
    from nano3.cpu.te import modules

    cuda.install()
    modules.install()
    mamba_standin.install()
    _enabled = True
    megatron.install()
    cross_entropy.install()
    if os.environ.get("RANK", "0") == "0":
        print("CPU backend: stand-ins for Transformer Engine, mamba-ssm and causal-conv1d; no CUDA.", file=sys.stderr)
        if not any(Path(__file__).parent.glob("__pycache__/*.nbi")):
            print("Their loops are compiled in the first step, once: some 20 s.", file=sys.stderr)
    return True
