"""Best fit in the order of a seed: which documents share a pack. Two loops, compiled where Numba is installed.

An image without Numba runs the same loops as plain Python, to the same packs, at a hundredth of the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from nano3.cpu.compiled import loops
except ModuleNotFoundError:

    def loops(function: Callable[..., Any]) -> Any:
        """The loops as they are written."""
        return function


SHIFT = 5
BITS, LOW = 1 << SHIFT, (1 << SHIFT) - 1
"""Of a word in the table of free room, kept in 64 so that no shift meets the sign."""
DE_BRUIJN = 0x077CB531
"""Its five highest of 32 bits differ after every shift, and so tell by how much (Leiserson, Prokop, Randall 1998)."""
PLACES = np.empty(BITS, np.int64)
PLACES[[(DE_BRUIJN << place) >> 27 & 31 for place in range(BITS)]] = np.arange(BITS)


def best_fit(
    lengths: np.ndarray, capacity: int, max_documents: int, seed: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Packs items of `lengths` (n,), each from 1 to `capacity`, at most `max_documents` into a pack.

    Returns the item numbers pack after pack, (n,) int64, and the packs' offsets into them, (packs + 1,) int64. The
    order of items and of packs is random, and the same for the same seed. O(n) steps, about 40 bytes an
    item beside the arguments.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    shortest = int(lengths.min()) if len(lengths) else 1
    words = capacity // BITS + 2
    pack_of = np.empty(len(lengths), np.int32)
    sizes = np.zeros(len(lengths), np.int32)
    packs = _fit(
        lengths[order],
        capacity,
        shortest,
        max_documents,
        np.zeros(words, np.int64),
        np.zeros(words // BITS + 1, np.int64),
        np.full(capacity + 1, -1, np.int32),
        np.empty(len(lengths), np.int32),
        sizes,
        pack_of,
    )
    rank_of_pack = rng.permutation(packs)
    offsets = np.zeros(packs + 1, np.int64)
    offsets[1 + rank_of_pack] = sizes[:packs]
    np.cumsum(offsets, out=offsets)
    items = np.empty(len(lengths), np.int64)
    _group(order, pack_of, offsets[rank_of_pack], items)
    return items, offsets


@loops
def _fit(lengths, capacity, shortest, max_documents, words, tops, newest, older, sizes, pack_of):
    """Fills `pack_of` (n,), the pack of each item, and `sizes`, the items of each pack; returns the packs.

    Packs with room left wait by their room, the one that was filled last on top: `newest[room]`, then `older[pack]`,
    -1 at the end. Bit r of `words` says whether a pack waits with room r, bit w of `tops` whether word w is not 0.
    """
    packs = 0
    for step in range(len(lengths)):
        length = lengths[step]
        # The least room that suffices: in the length's own word, else in the first word above that is not 0.
        word = length >> SHIFT
        found = words[word] >> (length & LOW) << (length & LOW)
        if found == 0:
            top = (word + 1) >> SHIFT
            above = tops[top] >> (word + 1 & LOW) << (word + 1 & LOW)
            while above == 0 and top + 1 < len(tops):
                top += 1
                above = tops[top]
            if above != 0:
                word = top * BITS + PLACES[(above & -above) * DE_BRUIJN >> 27 & 31]
                found = words[word]
        # Take the pack on top of those that have it, or begin one.
        if found != 0:
            room = word * BITS + PLACES[(found & -found) * DE_BRUIJN >> 27 & 31]
            pack = newest[room]
            newest[room] = older[pack]
            if newest[room] < 0:
                words[word] ^= 1 << (room & LOW)
                if words[word] == 0:
                    tops[word >> SHIFT] ^= 1 << (word & LOW)
        else:
            room, pack = capacity, packs
            packs += 1
        pack_of[step] = pack
        sizes[pack] += 1
        # Let it wait with what is left, if anything can still go there.
        room -= length
        if room >= shortest and sizes[pack] < max_documents:
            older[pack] = newest[room]
            newest[room] = pack
            word = room >> SHIFT
            words[word] |= 1 << (room & LOW)
            tops[word >> SHIFT] |= 1 << (word & LOW)
    return packs


@loops
def _group(order, pack_of, place_of_pack, items):
    """Writes the items of `order` into `items`, those of a pack one after the other from `place_of_pack` on."""
    for step in range(len(order)):
        pack = pack_of[step]
        items[place_of_pack[pack]] = order[step]
        place_of_pack[pack] += 1
