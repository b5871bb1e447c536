"""What a run takes from a token store: packs in an order, steps of a validation, names for its sources' losses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from data_prep.packing import PackedDataset

LOGGED_SOURCES = 32
"""Sources with a loss of their own in the logs; of more, the smallest share the last one."""
OTHER_SOURCES = "other"


class Epochs:
    """`samples` packs epoch after epoch, each in a seeded order of its own, or in the packs' own without `shuffle`.

    Which pack sample i is depends on i and the seed alone, not on ranks or workers: a run that goes on at sample i
    sees what it would have seen. Where the packs have the blocks of a curriculum, the order is drawn inside each.
    """

    def __init__(self, packs: PackedDataset, samples: int, seed: int | Sequence[int], shuffle: bool) -> None:
        self.packs, self.samples, self.shuffle = packs, samples, shuffle
        self.seed = [seed] if isinstance(seed, int) else list(seed)
        self._epoch, self._order = -1, np.arange(len(packs))

    def __len__(self) -> int:
        return self.samples

    def pack_of(self, sample: int) -> int:
        """Number of the pack that is sample `sample`."""
        epoch, place = divmod(sample, len(self.packs))
        if self.shuffle and epoch != self._epoch:
            drawn = np.random.default_rng([*self.seed, epoch])
            starts = accumulate(self.packs.blocks[:-1], initial=0)
            blocks = zip(starts, self.packs.blocks, strict=True)
            self._epoch, self._order = (
                epoch,
                np.concatenate([start + drawn.permutation(size) for start, size in blocks]),
            )
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


def validation_plan(packs: int, ranks: int, most: int) -> tuple[int, int]:
    """(steps, micro batches per step and rank) that take every pack once, with as little filling as possible.

    Args:
        packs: of the validation set.
        ranks: that take different packs.
        most: micro batches that a step may have.
    """
    per_rank = -(-packs // ranks)
    steps = -(-per_rank // most)
    return steps, -(-per_rank // steps)


def logged_sources(packs: Sequence[PackedDataset], most: int = LOGGED_SOURCES) -> tuple[list[str], np.ndarray]:
    """Names for the logs, and the place among them of every source number, counted through the stores of all `packs`.

    Sources of one name are one. Of more than `most` the smallest share the last name. The last entry is padding's, -1.
    """
    names = [name for one in packs for name in one.store.source_names]
    counts: dict[str, int] = {}
    for one in packs:
        for name, facts in one.store.manifest["sources"].items():
            counts[name] = counts.get(name, 0) + facts["supervised_tokens"]
    kept = list(counts)
    if len(kept) > most:
        largest = sorted(counts, key=lambda name: counts[name], reverse=True)
        kept = [*largest[: most - 1], OTHER_SOURCES]
    place = {name: number for number, name in enumerate(kept)}
    return kept, np.array([*(place.get(name, len(kept) - 1) for name in names), -1], dtype=np.int32)
