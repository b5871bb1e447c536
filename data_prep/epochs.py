"""The order in which packs are trained on and validated on."""

from __future__ import annotations

import numpy as np

from data_prep.packing import PackedDataset


class Epochs:
    """`samples` packs epoch after epoch, each in a seeded order of its own, or in the packs' own without `shuffle`.

    Which pack sample i is depends on i and the seed alone, not on ranks or workers: a run that goes on at sample i
    sees what it would have seen.
    """

    def __init__(self, packs: PackedDataset, samples: int, seed: int, shuffle: bool) -> None:
        self.packs, self.samples, self.seed, self.shuffle = packs, samples, seed, shuffle
        self._epoch, self._order = -1, np.arange(len(packs))

    def __len__(self) -> int:
        return self.samples

    def pack_of(self, sample: int) -> int:
        """Number of the pack that is sample `sample`."""
        epoch, place = divmod(sample, len(self.packs))
        if self.shuffle and epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.packs))
        return int(self._order[place])

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        return self.packs[self.pack_of(sample)]


class Once:
    """Every pack once, in order, then sequences of padding up to `samples`: sums over it are those of the whole set."""

    def __init__(self, packs: PackedDataset, samples: int) -> None:
        assert samples >= len(packs), "every pack has its turn"
        self.packs, self.samples = packs, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        return self.packs[sample] if sample < len(self.packs) else self.packs.padding()
