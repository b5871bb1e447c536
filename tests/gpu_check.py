"""`make gpu-check`: what can be checked of this repository on a machine with a GPU.

Today: the plain PyTorch scan, convolution and norm (nano3/cpu) run the tests of tests/test_kernels.py on CUDA tensors.
To come: the same against mamba-ssm's compiled kernels, one LoRA step on the stock stack, and numbers for the README.
Exit code 2 where there is no CUDA device, else pytest's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    print((__doc__ or "").split("Exit code")[0].strip(), flush=True)
    try:
        import torch
    except ImportError:
        print(f"error: no torch in {sys.executable}; name the container's: make gpu-check GPU_PYTHON=...")
        return 2
    if not torch.cuda.is_available():
        print(f"no CUDA device (torch {torch.__version__}, {sys.executable}): nothing was checked")
        return 2
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_kernels.py", "-k", "cuda"]
    return subprocess.run(command, cwd=root).returncode


if __name__ == "__main__":
    sys.exit(main())
