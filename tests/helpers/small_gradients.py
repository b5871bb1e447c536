"""Run by tests/nano3/test_parity_suite.py: where FP32 leaves the suite's bound after three steps of Adam, and why.

python -m tests.helpers.small_gradients OUT.json   -> for a dense pattern and for gated adapters
                                                      {"shares", "rest", "larger_epsilon", "fp64"}
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from nano3.parity import worker  # noqa: F401  # first: it switches the CPU backend on

# isort: split

import torch

from nano3.parity.case import Case, Sizes
from nano3.parity.comparison import TRAINED_BOUNDS, Outcome, largest_error, run

CASES = {
    "dense": (Case(pattern="M-MM*-M-", adam_epsilon=1e-8), Sizes(tp=2)),
    "gated": (Case(adapters="gated", adam_epsilon=1e-8), Sizes(cp=2)),
}
"""What goes beyond the bound in FP32, with Megatron-Core's epsilon."""


def outcomes(case: Case, sizes: Sizes, dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    """One rank's and two ranks'."""
    case = replace(case, dtype=dtype)
    return run(case.plain, Sizes()), run(case, sizes)


def small_gradients(one: Outcome, two: Outcome) -> dict[str, object]:
    """Of the values beyond the bound, their first gradients as shares of their tensors' largest; and the largest error
    of all other values."""
    shares, rest = [], 0.0
    for key, value in one.trained.items():
        error = (two.trained[key] - value).abs() / value.abs().max()
        beyond = error > TRAINED_BOUNDS[torch.float32]
        gradient = one.gradients[key].abs()
        shares += (gradient[beyond] / gradient.max()).tolist()
        rest = max(rest, float(error.where(~beyond, 0.0).max()))
    return {"shares": shares, "rest": rest}


def main() -> None:
    found = {}
    for name, (case, sizes) in CASES.items():
        found[name] = small_gradients(*outcomes(case, sizes, torch.float32))
        one, two = outcomes(case, sizes, torch.float64)
        found[name]["fp64"] = largest_error(two.trained, one.trained)[0]
        # Adam's step is lr * m / (sqrt(v) + epsilon): with a larger one the smallest gradients do not steer any more.
        one, two = outcomes(replace(case, adam_epsilon=1e-4), sizes, torch.float32)
        found[name]["larger_epsilon"] = largest_error(two.trained, one.trained)[0]
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
