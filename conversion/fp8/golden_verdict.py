"""Whether a server's log-probabilities are the golden ones: by how far they are off, and in which direction.

How far: a server in BF16 adds in another order, and FP8 makes steps of that. The same computation in BF16 shows how
large they are for this model on these prompts; a server may be off by small multiples of it.

In which direction: an FP8 model without rounded activations is hardly farther off than BF16 is. But it is off towards
one known place. With e the server's differences, d those of the other model and n those of BF16, at each token,

    way = sum(w e d) / sum(w d d),    w = 1 / (max(|d|, |n|) + 0.02 nats)

is 0 for the golden answers and 1 for the other model's, and noise that has nothing to do with d averages out. w keeps
single tokens, where a flipped route moves everything, from deciding. BF16 alone goes a part of the way, since noise
before a rounding undoes some of it; a server may go half of the rest. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conversion.fp8.golden_file import Golden

LARGEST, MEAN, OVERALL = 3.0, 2.0, 1.5
"""How often the BF16 difference a server may have: at a token, on average over a prompt, and over all prompts. Measured
on pico: right servers 0.8 to 1.1 times over all prompts, two swapped experts 1.6 to 2.5 (docs/fp8.md)."""
FLOORS = (0.1, 0.02, 0.01)
"""Of the same in nats: nobody is refused for less."""
TELLS = 0.7
"""The part of the way beyond which BF16 alone is too near to the other model for a verdict."""
_STEADY = 0.02
"""Nats: below this a token's weight does not grow."""


@dataclass(frozen=True)
class Limits:
    """What a right server stays below, in nats: at each token, on average over a prompt and over all; and the part of
    the way to each other model, infinite where the prompts cannot tell it from BF16."""

    largest: float
    mean: float
    overall: float
    ways: dict[str, float]

    @classmethod
    def of(cls, golden: Golden) -> Limits:
        """Those of a file, from its BF16 answers."""
        noise = [np.abs(part) for part in differences(golden.logprobs, golden.bf16)]
        measured = (
            max(float(part.max()) for part in noise),
            max(float(part.mean()) for part in noise),
            float(np.concatenate(noise).mean()),
        )
        times = (LARGEST, MEAN, OVERALL)
        largest, mean, overall = (max(t * m, low) for t, m, low in zip(times, measured, FLOORS, strict=True))
        gone = {name: way(golden, golden.bf16, name) for name in golden.others}
        ways = {name: (1 + part) / 2 if part <= TELLS else float("inf") for name, part in gone.items()}
        return cls(largest, mean, overall, ways)


def differences(right: Sequence[np.ndarray], answered: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Answered minus right for every token but the first, an array for each prompt."""
    return [(there - here)[1:] for here, there in zip(right, answered, strict=True)]


def way(golden: Golden, answered: Sequence[np.ndarray], name: str) -> float:
    """How far the answers went from the golden ones (0) to those of the other model `name` (1)."""
    off, other, noise = (
        np.concatenate(differences(golden.logprobs, found)) for found in (answered, golden.others[name], golden.bf16)
    )
    weight = 1 / (np.maximum(np.abs(other), np.abs(noise)) + _STEADY)
    total = float((weight * other * other).sum())
    return float((weight * off * other).sum()) / total if total else 0.0


def of_prompt(golden: Golden, number: int, answered: np.ndarray, limits: Limits) -> str | None:
    """What is wrong with the answers to one prompt; None where nothing is."""
    off = np.abs(answered - golden.logprobs[number])[1:]
    if not np.isfinite(off).all():
        return f"no number for token {1 + int(np.argmin(np.isfinite(off)))}"
    if off.max() > limits.largest:
        return f"a token is off by more than {limits.largest:.3f}"
    return f"off by more than {limits.mean:.3f} on average" if off.mean() > limits.mean else None


def of_all(golden: Golden, answered: Sequence[np.ndarray], limits: Limits) -> list[str]:
    """What is wrong with the answers to all prompts together."""
    mean = float(np.abs(np.concatenate(differences(golden.logprobs, answered))).mean())
    problems = [] if mean <= limits.overall else [f"all prompts are off by more than {limits.overall:.3f} on average"]
    for name in golden.others:
        gone = way(golden, answered, name)
        if not gone <= limits.ways[name]:
            problems.append(
                f"it answers like a model with {name}: {gone:.0%} of the way, limit {limits.ways[name]:.0%}"
            )
    return problems


def problems(golden: Golden, answered: Sequence[np.ndarray]) -> list[str]:
    """All that is wrong with a server's answers."""
    limits = Limits.of(golden)
    single = [of_prompt(golden, number, found, limits) for number, found in enumerate(answered)]
    named = [f"prompt {number}: {problem}" for number, problem in enumerate(single) if problem]
    return named + of_all(golden, answered, limits)


def unseen(golden: Golden) -> list[str]:
    """What a pass does not show: planted faults that were not seen, and experts that no prompt reached."""
    experts = golden.facts["experts"]
    missed = experts["of"] - experts["reached"]
    found = [fault["name"] for fault in golden.facts["planted"] if not fault["seen"]]
    found += [name for name, limit in Limits.of(golden).ways.items() if limit > 1 and name not in found]
    return found + ([f"{missed} routed experts that no prompt reached"] if missed else []) or ["nothing of these"]
