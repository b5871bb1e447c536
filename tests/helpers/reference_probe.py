"""Run by tests/nano3/test_reference.py: one rank of Megatron-Core on the parity suite's case, in FP32.

python -m tests.helpers.reference_probe OUT.safetensors
"""

from __future__ import annotations

import sys

from nano3.parity.comparison import run  # first: it switches the CPU backend on

# isort: split

import torch
from safetensors.torch import save_file

from nano3.parity.case import Case, Sizes


def main() -> None:
    outcome = run(Case(dtype=torch.float32), Sizes())
    save_file({"loss": torch.tensor(outcome.losses[0]), **outcome.gradients}, sys.argv[1])


if __name__ == "__main__":
    main()
