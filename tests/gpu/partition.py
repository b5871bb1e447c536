"""Tier (b): which positions of a pack Transformer Engine gives a context-parallel rank, against our own rule.

    NANO3_CPU=0 python -m tests.gpu.partition     # prints how many positions differ, of how many

The rule decides which tokens a rank's Mamba state goes over: a position too many is a document that leaks.
"""

from __future__ import annotations

from nano3 import cpu

cpu.enable()

import torch  # noqa: E402

from nano3.cpu.te.partition import partitioned_indices  # noqa: E402

CASES = (
    (2, (0, 4, 12)),
    (2, (0, 8, 24, 28, 64)),
    (3, (0, 12, 18)),
    (4, (0, 8, 72, 80, 8192)),
    (8, (0, 16, 4096, 8192)),
)
"""Ranks, and the boundaries of a pack's documents, multiples of twice the ranks."""


def different() -> tuple[int, int]:
    """Positions that differ, and all of them, over the cases and their ranks."""
    import transformer_engine.pytorch  # noqa: F401  # which loads the extension
    import transformer_engine_torch as tex

    device = "cpu" if cpu.enabled() else "cuda"
    wrong = total = 0
    for size, bounds in CASES:
        boundaries = torch.tensor(bounds, dtype=torch.int32)
        for rank in range(size):
            theirs = tex.thd_get_partitioned_indices(boundaries.to(device), bounds[-1], size, rank).cpu()
            ours = partitioned_indices(boundaries, bounds[-1], size, rank)
            wrong += int((theirs != ours).sum()) if theirs.shape == ours.shape else len(ours)
            total += len(ours)
    return wrong, total


if __name__ == "__main__":
    print(*different())
