"""Several low-rank changes of one matrix as one of bounded rank: sum, TIES or DARE, then a truncated SVD.

The change that an adapter makes to a matrix W (out, in) is its delta, scale * B @ A. A sum of deltas has at most the
sum of their ranks, so its SVD comes from the factors and costs next to nothing; the other rules choose elements of the
deltas themselves, which makes full matrices. Of all matrices of rank r the truncated SVD is the nearest in the
Frobenius norm (Eckart and Young, 1936), and what it drops is known exactly: the singular values behind the r-th.

TIES: arXiv 2306.01708. DARE: arXiv 2311.03099. Both as PEFT 0.21 has them (peft/utils/merge_utils.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from conversion.certificates.certificate import norm_ratio

Method = Literal["sum", "ties", "dare", "dare-ties"]
METHODS: tuple[Method, ...] = get_args(Method)

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (rank, in) and B (out, rank), the scale in B: the delta is B @ A."""

Rows = tuple[tuple[int, int], ...]
"""(first row, number of rows) of a matrix that is a part of a delta."""


@dataclass(frozen=True)
class Rule:
    """How deltas become one.

    `density` is the share of elements that TIES and DARE keep: TIES the largest of a delta, DARE random ones, which
    are divided by it. `seed` decides those of DARE.
    """

    method: Method = "sum"
    density: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Combined:
    """One adapter of a matrix: A and B of the rank that was asked for, FP32. `dropped` and `whole` are sums of squares
    of the delta: of what the rank has no place for, and of all."""

    low: torch.Tensor
    high: torch.Tensor
    dropped: float
    whole: float


def combine(
    pairs: Sequence[Pair], weights: Sequence[float], rank: int, rule: Rule, matrices: Sequence[Rows]
) -> Combined:
    """One adapter of `rank` for the deltas of one module.

    Args:
        pairs: each adapter's factors; None of them need have the same rank.
        weights: one for each of them.
        rank: rows of A and columns of B of the result. What exceeds the delta's own rank is zero.
        rule: how the deltas become one.
        matrices: the rows of each Hugging Face matrix of the module. TIES finds the largest elements of each by itself.
    """
    if rule.method == "sum":
        low = torch.cat([a.double() for a, _ in pairs])
        high = torch.cat([weight * b.double() for (_, b), weight in zip(pairs, weights, strict=True)], dim=1)
        return _truncated_product(low, high, rank)
    deltas = torch.stack([b.float() @ a.float() for a, b in pairs])
    kept = [_kept(delta, number, rule, matrices) for number, delta in enumerate(deltas)]
    merged = merge_deltas(torch.stack(kept), torch.tensor(weights), elect=rule.method != "dare")
    left, values, right = torch.linalg.svd(merged.double(), full_matrices=False)
    return _truncated(left, values, right, rank)


def merge_deltas(deltas: torch.Tensor, weights: torch.Tensor, elect: bool) -> torch.Tensor:
    """The weighted sum of `deltas` (n, out, in); or with `elect`, for each element, the weighted mean of those whose
    sign is that of the unweighted sum. A delta that is zero there has no sign and no part in the mean."""
    weighted = weights[:, None, None] * deltas
    if not elect:
        return weighted.sum(dim=0)
    agree = deltas.sign() == torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def keep_largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The share `density` of the elements, the largest by size; the others zero."""
    keep = torch.topk(delta.abs().flatten(), int(density * delta.numel())).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[keep] = True
    return torch.where(mask.view_as(delta), delta, 0)


def keep_random(delta: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """Each element with probability `density`, divided by it; the others zero."""
    mask = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(mask, delta / density, 0)


def seed_for(seed: int, name: str) -> int:
    """A seed of its own for the matrix `name`, whatever is computed before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])


def _kept(delta: torch.Tensor, number: int, rule: Rule, matrices: Sequence[Rows]) -> torch.Tensor:
    """The elements of adapter `number`'s delta that its rule keeps."""
    if rule.density == 1:
        return delta
    if rule.method != "ties":
        return keep_random(delta, rule.density, seed_for(rule.seed, f"adapter {number}"))
    result = torch.zeros_like(delta)
    for spans in matrices:
        rows = torch.cat([torch.arange(first, first + count) for first, count in spans])
        result[rows] = keep_largest(delta[rows], rule.density)
    return result


def _truncated_product(low: torch.Tensor, high: torch.Tensor, rank: int) -> Combined:
    """The same of high @ low, by the SVD of a matrix no larger than the sum of the ranks."""
    q_high, r_high = torch.linalg.qr(high)
    q_low, r_low = torch.linalg.qr(low.T)
    left, values, right = torch.linalg.svd(r_high @ r_low.T, full_matrices=False)
    return _truncated(q_high @ left, values, right @ q_low.T, rank)


def _truncated(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, rank: int) -> Combined:
    """A and B of `rank` from an SVD. Both take the root of the singular values: training on moves them alike."""
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    low, high = right.new_zeros(rank, right.shape[1]), left.new_zeros(left.shape[0], rank)
    low[:kept] = root[:, None] * right[:kept]
    high[:, :kept] = left[:, :kept] * root
    squares = values.square()
    return Combined(low.float(), high.float(), float(squares[kept:].sum()), float(squares.sum()))


def relative_error(parts: Sequence[Combined]) -> float:
    """Frobenius norm of what was dropped over that of all, of the matrices of one module; 0 of a zero delta."""
    return norm_ratio(sum(part.dropped for part in parts), sum(part.whole for part in parts)) or 0.0
