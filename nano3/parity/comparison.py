"""Layouts against one rank: the numbers, their bounds, the table."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch

from nano3.parity.case import Case, Sizes
from nano3.parity.processes import on_ranks
from nano3.parity.shards import assemble
from nano3.parity.worker import train

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest relative error of the losses and of every gradient."""
TRAINED_BOUNDS = {torch.float64: 1e-9, torch.float32: 5e-5}
"""Of every adapter after the last step. Adam divides a gradient by its own size: the rounding of small ones counts.

FP32's bound is what LAYOUTS keep, and no theorem. `tp2@M-MM*-M-` is off by 8.9e-5 in one of 192 values of one matrix,
whose gradient is 2.5e-8, 3.4e-6 of the matrix's largest and near Adam's epsilon of 1e-8. FP32 has 9 % of it wrong, and
all other values differ by 1.8e-6 at most. With an epsilon of 1e-4 the figure is 4.8e-7, in FP64 9.1e-16
(tests/helpers/small_gradients.py). So it is with `cp2+gated`: 1.4e-4 in one of 256 values, whose gradient is 6.8e-9.
Gated rows have the larger epsilon in FP32 (`Case.epsilon`)."""
NORM_BOUND = 1e-6
"""Of the gradient norm, in FP64 too: Megatron-Core's optimizer adds it up in FP32."""
NEAREST_TIE = 1e-6
"""Scores of a token's last chosen and first rejected expert must differ by more, or rounding decides the route."""


@dataclass
class Outcome:
    """What one layout computed, put together over its ranks."""

    losses: list[float]
    norm: float
    gradients: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]
    drift: float
    """Largest difference between two ranks' copies of one value; replicas must agree bit for bit."""
    tie: float
    seconds: float

    @property
    def exact_norm(self) -> float:
        """Norm of the assembled gradients."""
        return math.sqrt(sum(float(value.double().square().sum()) for value in self.gradients.values()))


@dataclass
class Row:
    """Largest relative errors of a layout against one rank; `worst` names the tensor with the largest."""

    layout: str
    ranks: int
    precision: str
    loss: float
    gradient: float
    norm: float
    trained: float
    drift: float
    seconds: float
    worst: str
    holds: bool


def run(case: Case, sizes: Sizes) -> Outcome:
    """Trains the case on a layout."""
    start = time.perf_counter()
    ranks = on_ranks(sizes, train, case, sizes)
    gradients, first = assemble(rank["gradients"] for rank in ranks)
    trained, last = assemble(rank["trained"] for rank in ranks)
    return Outcome(
        losses=ranks[0]["losses"],
        norm=ranks[0]["norms"][0],
        gradients=gradients,
        trained=trained,
        drift=max(first, last),
        tie=min(rank["tie"] for rank in ranks),
        seconds=time.perf_counter() - start,
    )


def largest_error(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Over all tensors, the largest error relative to the tensor's largest value, and that tensor's name.

    Raises:
        ValueError: other tensors than expected, or one of zeros only, of which nothing would be compared.
    """
    if ours.keys() != expected.keys():
        raise ValueError(f"tensors of one side only: {sorted(ours.keys() ^ expected.keys())[:5]}")
    errors = {}
    for key, value in expected.items():
        scale = float(value.abs().max())
        if scale == 0:
            raise ValueError(f"{key} is zero everywhere")
        error = float((ours[key] - value).abs().max()) / scale
        errors[key] = math.inf if math.isnan(error) else error
    worst = max(errors, key=lambda key: errors[key])
    return errors[worst], worst


def compare(name: str, case: Case, sizes: Sizes, ours: Outcome, single: Outcome) -> Row:
    """The row of the layout `name`."""
    gradient, worst = largest_error(ours.gradients, single.gradients)
    row = Row(
        layout=name,
        ranks=sizes.ranks,
        precision={torch.float64: "fp64", torch.float32: "fp32"}[case.dtype],
        loss=max(abs(a / b - 1) for a, b in zip(ours.losses, single.losses, strict=True)),
        gradient=gradient,
        norm=abs(ours.norm / single.exact_norm - 1),
        trained=largest_error(ours.trained, single.trained)[0],
        drift=ours.drift,
        seconds=ours.seconds,
        worst=worst,
        holds=False,
    )
    row.holds = (
        max(row.loss, row.gradient) <= BOUNDS[case.dtype]
        and row.trained <= TRAINED_BOUNDS[case.dtype]
        and row.norm <= NORM_BOUND
        and row.drift == 0
    )
    return row


HEADER = f"{'layout':<22}{'ranks':>5} {'':5}{'loss':>9}{'gradient':>10}{'norm':>9}{'3 steps':>9}{'drift':>8}{'s':>7}"


def line(row: Row) -> str:
    """One line of the table."""
    numbers = f"{row.loss:>9.1e}{row.gradient:>10.1e}{row.norm:>9.1e}{row.trained:>9.1e}{row.drift:>8.0e}"
    verdict = "" if row.holds else f"  BEYOND BOUNDS, worst gradient: {row.worst}"
    return f"{row.layout:<22}{row.ranks:>5} {row.precision:<5}{numbers}{row.seconds:>7.1f}{verdict}"


def as_json(row: Row) -> dict[str, object]:
    """A row for parity.json; an infinite error, which JSON has not, as text."""
    return {key: value if value != math.inf else "inf" for key, value in asdict(row).items()}
