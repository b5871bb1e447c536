"""The packs that a run trains on, in its order, from one token store or from a mixture of several.

Sample i of a run is a pack that depends on the seed and on i alone. So ranks, workers and restarts change nothing, and
nothing is written but the mixture's file.

The stores take turns in cycles of a thousand samples. A cycle's turns are drawn by the seed and its number; how many
each store has is what its share of all samples up to the cycle's end, rounded, exceeds that up to its beginning. So
shares are exact over a run, and never off by more than one pack at the end of a cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.epochs import Epochs
from data_prep.packing import PackedDataset
from nano3.cli import UserError
from nano3.mixture import DataSize, MixtureFile, data_size, read_mixture, rounds_of

CYCLE = 1000
"""Samples in which every store has its turns; more where a store's share is less than two of them."""


class Blend:
    """Which store sample i comes from, and the how-manieth of that store it is.

    Args:
        shares: of each store, positive; they add up to 1.
        seed: of the turns in a cycle.
        period: samples after which every store begins anew; None where shares alone are given.
    """

    def __init__(self, shares: Sequence[Fraction], seed: int, period: int | None = None) -> None:
        self.seed, self.period = seed, period
        self._bounds = list(accumulate(shares))
        self._length = max(CYCLE, int(2 / min(shares)) + 1)
        self._cycle: tuple[int, int] | None = None
        self._turns = self._before = self._rank = np.zeros(0, dtype=np.int64)

    def locate(self, sample: int) -> tuple[int, int]:
        """(number of the store, samples of that store before this one)."""
        lap, place = divmod(sample, self.period) if self.period else (0, sample)
        cycles = max(1, self.period // self._length) if self.period else None
        cycle = place // self._length if cycles is None else min(place // self._length, cycles - 1)
        if (lap, cycle) != self._cycle:
            self._draw(lap, cycle, last=cycles is not None and cycle == cycles - 1)
        place -= cycle * self._length
        store = int(self._turns[place])
        return store, int(self._before[store] + self._rank[place])

    def _draw(self, lap: int, cycle: int, last: bool) -> None:
        """The turns of a cycle; the last one before a new lap takes in what is left over."""
        first = cycle * self._length
        end = self.period if last and self.period else first + self._length
        before, after = self._counts(first), self._counts(end)
        turns = np.repeat(np.arange(len(before)), after - before)
        self._turns = np.random.default_rng([self.seed, lap, cycle]).permutation(turns)
        self._rank = np.empty(len(turns), dtype=np.int64)
        for store in range(len(before)):
            places = np.flatnonzero(self._turns == store)
            self._rank[places] = np.arange(len(places))
        self._before = before + lap * self._counts(self.period) if self.period else before
        self._cycle = (lap, cycle)

    def _counts(self, samples: int) -> np.ndarray:
        """Samples of each store among the first `samples`, (stores,) int64; they add up to it."""
        rounded = [int(bound * samples + Fraction(1, 2)) for bound in self._bounds]
        return np.diff([0, *rounded])


class TrainingSamples:
    """`samples` packs for training, by number.

    Args:
        data: a token store, or a mixture's YAML file.
        seq_length: positions in a pack.
        pad_multiple: what documents are padded to in the packs.
        samples: that the run takes.
        seed: of their order.

    Raises:
        UserError: a store or its packs cannot be used, or the run is longer than the epochs that the mixture gives.
    """

    def __init__(self, data: Path | str, seq_length: int, pad_multiple: int, samples: int, seed: int) -> None:
        self.samples = samples
        mixture = read_mixture(data)
        self.packs = open_packs(mixture, seq_length, pad_multiple)
        self._starts = [0, *accumulate(len(packs.store.source_names) for packs in self.packs)]
        if len(self.packs) == 1 and not mixture.by_epochs:
            self._blend, self._epochs = None, [Epochs(self.packs[0], samples, seed, shuffle=True)]
        else:
            self._blend = _blend(mixture, self.packs, seed)
            seeds = [(seed, number) for number in range(len(self.packs))]
            self._epochs = [
                Epochs(packs, samples, drawn, shuffle=True) for packs, drawn in zip(self.packs, seeds, strict=True)
            ]

    def __len__(self) -> int:
        return self.samples

    def pack_of(self, sample: int) -> tuple[int, int]:
        """(number of the store, number of its pack) that is sample `sample`."""
        store, number = self._blend.locate(sample) if self._blend else (0, sample)
        return store, self._epochs[store].pack_of(number)

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        """A pack as `PackedDataset` gives it; its `source` counts through the sources of all stores."""
        store, number = self.pack_of(sample)
        item = self.packs[store][number]
        if self._starts[store]:
            item["source"] = np.where(item["source"] < 0, item["source"], item["source"] + self._starts[store])
        return item

    def lengths(self, sample: int) -> list[int]:
        """Positions of each document (no padding) in a sample."""
        store, number = self.pack_of(sample)
        documents, offsets = self.packs[store].documents(number), self.packs[store].store.offsets
        return (offsets[documents + 1] - offsets[documents] - 1).tolist()


def open_packs(mixture: MixtureFile, seq_length: int, pad_multiple: int) -> list[PackedDataset]:
    """The packs of every store of a mixture."""
    return [PackedDataset(store, seq_length, pad_multiple, mixture.curriculum) for store in mixture.stores]


def size_of(data: Path | str, seq_length: int, pad_multiple: int) -> DataSize:
    """The size of a token store or of a mixture. Raises `UserError` for a store without its packs."""
    mixture = read_mixture(data)
    packs = open_packs(mixture, seq_length, pad_multiple)
    return data_size(mixture, [one.facts["documents"] for one in packs], list(map(len, packs)))


def check_length(data: Path | str, seq_length: int, pad_multiple: int, steps: int, global_batch: int) -> None:
    """Refuses a run that would meet packs more often than its mixture's epochs say; the last step may be filled up."""
    size = size_of(data, seq_length, pad_multiple)
    most = -(-size.packs // global_batch)
    if size.by_epochs and steps > most:
        raise UserError(
            f"{data}: its epochs are {size.packs} packs, which are {most} steps of train.global_batch={global_batch}; "
            f"train.steps={steps} would go on beyond them: set train.steps={most}, or give more epochs"
        )


def _blend(mixture: MixtureFile, packs: Sequence[PackedDataset], seed: int) -> Blend:
    amounts: Sequence[Any] = rounds_of(mixture, list(map(len, packs))) if mixture.by_epochs else mixture.amounts
    total = sum(amounts)
    shares = [Fraction(amount) / total for amount in amounts]
    return Blend(shares, seed, int(total) if mixture.by_epochs else None)
