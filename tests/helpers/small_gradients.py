"""Run by tests/nano3/test_parity_suite.py: where FP32 leaves the suite's bound after three steps of Adam, and why.

python -m tests.helpers.small_gradients OUT.json   -> {"shares", "rest", "larger_epsilon", "fp64"}
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

from nano3.parity import worker  # first: it switches the CPU backend on

# isort: split

import torch
from megatron.core.optimizer import OptimizerConfig

from nano3.parity.case import Case, Sizes
from nano3.parity.comparison import TRAINED_BOUNDS, Outcome, largest_error, run

PATTERN = "M-MM*-M-"
TWO = Sizes(tp=2)


def outcomes(dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    """One rank's and two tensor-parallel ranks'."""
    case = Case(pattern=PATTERN, dtype=dtype)
    return run(case.plain, Sizes()), run(case, TWO)


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
    found = small_gradients(*outcomes(torch.float32))
    one, two = outcomes(torch.float64)
    found["fp64"] = largest_error(two.trained, one.trained)[0]
    # Adam's step is lr * m / (sqrt(v) + epsilon): with a larger epsilon the smallest gradients do not steer any more.
    with patch.object(worker, "OptimizerConfig", partial(OptimizerConfig, adam_eps=1e-4)):
        one, two = outcomes(torch.float32)
    found["larger_epsilon"] = largest_error(two.trained, one.trained)[0]
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
