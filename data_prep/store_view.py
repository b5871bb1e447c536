"""A token store as people look at it: documents as runs of text that train alike, packs, and the store in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from data_prep.packing import PackedDataset
from data_prep.tokens import ChatTokenizer
from nano3.cli import UserError
from nano3.token_store import TokenStore

SHOWN_PACKS = 3
"""Fullest and emptiest packs that are named."""


class Piece(NamedTuple):
    """One token: its text, weight in the loss, stage (0 is none), and whether it is a control token."""

    text: str
    weight: float
    stage: int
    control: bool


@dataclass(frozen=True)
class DocumentView:
    """A document as it is shown. `padding` are positions behind it in a pack, `slices` the context-parallel rank that
    each position of the pack's row belongs to, empty without context parallelism."""

    origin: str
    source: str
    pieces: list[Piece]
    padding: int = 0
    slices: tuple[int, ...] = ()

    @property
    def trained(self) -> int:
        """Tokens that the loss counts."""
        return sum(piece.weight > 0 for piece in self.pieces)


@dataclass(frozen=True)
class Overview:
    """A store in numbers. `bins`: (shortest, longest, documents) by powers of two; packs: (number, positions held)."""

    store: TokenStore
    packs: PackedDataset
    bins: list[tuple[int, int, int]]
    stages: dict[int, int]
    fullest: list[tuple[int, int]]
    emptiest: list[tuple[int, int]]


class Viewer:
    """Turns documents of a store into text. Without the tokenizer that made it, tokens are shown as numbers.

    Raises:
        UserError: `tokenizer` is not the store's.
    """

    def __init__(self, store: TokenStore, tokenizer: str | None) -> None:
        self.store = store
        named = tokenizer or store.manifest.get("tokenizer_folder")
        self._tokenizer: ChatTokenizer | None = None
        if named is not None:
            try:
                opened = ChatTokenizer(named)
                opened.check_made(store)
                self._tokenizer = opened
            except UserError:
                if tokenizer is not None:
                    raise

    @property
    def has_text(self) -> bool:
        """Whether tokens can be shown as text."""
        return self._tokenizer is not None

    def document(self, number: int, padding: int = 0, context_parallel: int = 1) -> DocumentView:
        """One document of the store."""
        tokens, weights = self.store.document(number)
        facts = zip(self._texts(tokens.tolist()), weights.tolist(), self.store.stages(number).tolist(), strict=True)
        pieces = [Piece(text, weight, stage, control) for (text, control), weight, stage in facts]
        slices = _slices(len(tokens) - 1 + padding, context_parallel) if context_parallel > 1 else ()
        source = self.store.source_names[self.store.source(number)]
        return DocumentView(self.store.origin(number), source, pieces, padding, slices)

    def pack(self, packs: PackedDataset, number: int, context_parallel: int = 1) -> list[DocumentView]:
        """The documents of a pack, each with its padding."""
        multiple = packs.facts["pad_multiple"]
        views = []
        for document in packs.documents(number).tolist():
            positions = int(self.store.offsets[document + 1] - self.store.offsets[document]) - 1
            views.append(self.document(document, -positions % multiple, context_parallel))
        return views

    def _texts(self, tokens: Sequence[int]) -> Iterator[tuple[str, bool]]:
        """Text of each token and whether it is one of the added ones; a character belongs to the token that ends it."""
        if self._tokenizer is None:
            yield from ((f" {token}", False) for token in tokens)
            return
        waiting = b""
        for token in tokens:
            waiting += self._tokenizer.bytes_of(token)
            try:
                text, waiting = waiting.decode(), b""
            except UnicodeDecodeError as error:
                cut = len(waiting) - error.start > 3  # no character is that long: the bytes are no text
                text, waiting = (waiting.decode(errors="replace"), b"") if cut else ("", waiting)
            yield text, self._tokenizer.is_added(token)


def _slices(positions: int, ranks: int) -> tuple[int, ...]:
    """The context-parallel rank of each position of a document: 2 * ranks pieces, rank r has pieces r and last - r."""
    pieces = 2 * ranks
    places = np.arange(positions) * pieces // max(1, positions)
    return tuple(np.minimum(places, pieces - 1 - places).tolist())


def overview(packs: PackedDataset) -> Overview:
    """Reads lengths and stages of a store, and how full its packs are."""
    store = packs.store
    lengths = store.lengths()
    filled = packs.filled()
    order = np.argsort(filled, kind="stable")
    named = [[(int(number), int(filled[number])) for number in part[:SHOWN_PACKS]] for part in (order[::-1], order)]
    stages = store.stage_counts()
    return Overview(
        store,
        packs,
        _bins(lengths),
        {stage: int(count) for stage, count in enumerate(stages) if stage and count},
        named[0],
        named[1],
    )


def _bins(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Documents by length, from each power of two to just below the next."""
    exponents = np.frexp(lengths)[1] - 1
    first, last = int(exponents.min()), int(exponents.max())
    counts = np.bincount(exponents - first, minlength=last - first + 1)
    return [(1 << (first + place), (2 << (first + place)) - 1, int(count)) for place, count in enumerate(counts)]


def runs(view: DocumentView) -> Iterator[tuple[float, int, list[Piece]]]:
    """Neighbouring tokens of equal weight and stage, as (weight, stage, tokens)."""
    for (weight, stage), group in groupby(view.pieces, key=lambda piece: (piece.weight, piece.stage)):
        yield weight, stage, list(group)


def label_of(weight: float, stage: int) -> str:
    """What stands in front of a run: its weight unless that is 0 or 1 outside a stage, and its stage."""
    parts = [f"weight {weight:g}"] if weight not in (0, 1) or (stage and weight != 1) else []
    return ", ".join(parts + ([f"stage {stage}"] if stage else []))
