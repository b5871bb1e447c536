"""Packs: which documents share one training sequence, and the arrays that training reads.

A pack index is a folder inside the token store and holds document numbers only, so that another sequence length costs
a second, not another tokenization:

    packs-4096/documents.bin   int64, document numbers, pack after pack
    packs-4096/packs.idx       int64, packs + 1 offsets into it
    packs-4096/packs.json      how it was made, for which store

A document of n stored tokens gives n - 1 positions (each predicts the next token), rounded up to `pad_multiple`.
Documents are shuffled by a seed and each goes where the least room would be left (best_fit.py). Best fit *decreasing*
wastes no less in practice but puts hundreds of short documents into one pack and sorts the training data by length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nano3.cli import UserError
from nano3.file_digests import file_sha256
from nano3.outputs import fresh_output
from nano3.pack_index import DOCUMENTS, FACTS, KIND, OFFSETS, VERSION, Curriculum, index_name, read_index
from nano3.store_contents import check_index, check_store
from nano3.token_store import MANIFEST, TokenStore, mapped

PADDING = -1
"""The source of a position that holds no token of a document."""
SHOWN = 3
"""Documents that an error names."""


def build_packs(
    store: TokenStore,
    seq_length: int,
    pad_multiple: int = 1,
    max_documents: int = 64,
    seed: int = 1234,
    drop_long: bool = False,
    curriculum: Curriculum | None = None,
) -> dict[str, Any]:
    """Writes the pack index for these settings into the store, replacing an older one, and returns its `packs.json`.

    With a `curriculum` the packs of its first block come first, and no pack holds documents of two blocks.

    Raises `UserError` when a document is longer than `seq_length` (unless `drop_long`, which leaves such documents
    out and counts them), or when nothing is left to train on. Nothing else in the store changes.
    """
    check_settings(seq_length, pad_multiple, max_documents, seed)
    lengths = -(-(store.lengths() - 1) // pad_multiple) * pad_multiple
    fits, too_long = np.flatnonzero(lengths <= seq_length), np.flatnonzero(lengths > seq_length)
    if len(too_long) and not drop_long:
        named = ", ".join(map(store.origin, too_long[:SHOWN].tolist())) + (", ..." if len(too_long) > SHOWN else "")
        raise UserError(
            f"{len(too_long)} of {len(lengths)} documents are longer than --seq-length {seq_length} ({named}): "
            f"the longest takes {lengths.max()} positions; raise --seq-length, or leave them out with --drop-long"
        )
    if not len(fits):
        raise UserError(f"no document fits --seq-length {seq_length} (the shortest takes {lengths.min()}); raise it")
    documents, offsets, blocks = _packed(store, lengths, fits, seq_length, max_documents, seed, curriculum)
    packs, positions = len(offsets) - 1, int((store.lengths() - 1)[fits].sum())
    lost = sum(int(np.count_nonzero(store.document(number)[1])) for number in too_long.tolist())
    if lost == store.manifest["supervised_tokens"]:
        raise UserError(f"the documents that fit --seq-length {seq_length} have no supervised token; raise it")
    facts = {
        "format": KIND,
        "version": VERSION,
        "store_sha256": file_sha256(store.folder / MANIFEST),
        "seq_length": seq_length,
        "pad_multiple": pad_multiple,
        "max_documents": max_documents,
        "seed": seed,
        "packs": packs,
        "blocks": blocks,
        "documents": len(documents),
        "dropped_documents": len(too_long),
        "positions": positions,
        "supervised_positions": store.manifest["supervised_tokens"] - lost,
        "most_documents_in_a_pack": int(np.diff(offsets).max()),
        "efficiency": round(positions / (packs * seq_length), 6),
    }
    with fresh_output(store.folder / index_name(seq_length, pad_multiple, curriculum), KIND) as out:
        documents.astype("<i8").tofile(out / DOCUMENTS)
        offsets.astype("<i8").tofile(out / OFFSETS)
        (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _packed(
    store: TokenStore,
    lengths: np.ndarray,
    fits: np.ndarray,
    seq_length: int,
    max_documents: int,
    seed: int,
    curriculum: Curriculum | None,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The documents `fits` pack after pack, the packs' offsets into them, and how many packs each block has."""
    from data_prep.best_fit import best_fit  # here: it loads Numba, and most of what imports this module packs nothing

    if curriculum is None:
        items, offsets = best_fit(lengths[fits], seq_length, max_documents, seed)
        return fits[items], offsets, [len(offsets) - 1]
    if curriculum.blocks > len(fits):
        raise UserError(f"--blocks {curriculum.blocks} is more than the {len(fits)} documents; give fewer")
    ranked = fits[np.argsort(store.order(curriculum.order)[fits], kind="stable")]
    documents, sizes, blocks = [], [], []
    for number, block in enumerate(np.array_split(ranked, curriculum.blocks)):
        block.sort()
        items, offsets = best_fit(lengths[block], seq_length, max_documents, (seed, number))
        documents.append(block[items])
        sizes.append(np.diff(offsets))
        blocks.append(len(offsets) - 1)
    return np.concatenate(documents), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]), blocks


def check_settings(seq_length: int, pad_multiple: int, max_documents: int, seed: int) -> None:
    """Refuses settings under which nothing can be packed, naming the command-line option."""
    for name, value in (("--seq-length", seq_length), ("--pad-multiple", pad_multiple)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if seed < 0:
        raise UserError(f"--seed {seed} must be at least 0")
    if max_documents < 1:
        raise UserError(f"--max-docs-per-pack {max_documents} must be at least 1")
    if seq_length % pad_multiple:
        raise UserError(
            f"--seq-length {seq_length} is not a multiple of --pad-multiple {pad_multiple}; "
            f"the next is {-(-seq_length // pad_multiple) * pad_multiple}"
        )


class PackedDataset:
    """Training sequences of a token store, by number; opens in a millisecond and holds no data in memory.

    `folder` is the token store; `seq_length`, `pad_multiple` and `curriculum` choose its pack index, which `prepare.py`
    or `repack.py` has made. Raises `UserError` when it is missing, truncated or made for another store.
    """

    with_stages = False
    """Whether sequences have the stages of their labels; few runs look at them."""

    def __init__(
        self, folder: Path | str, seq_length: int, pad_multiple: int = 1, curriculum: Curriculum | None = None
    ) -> None:
        self.store = TokenStore(folder)
        self.index, self.facts = read_index(self.store, seq_length, pad_multiple, curriculum)

    def check_contents(self) -> None:
        """Raises `UserError` when store or index are not what was written, or do not fit together; reads everything
        that changed since it was last checked."""
        check_store(self.store)
        check_index(self.store, self.index, self.facts)

    def __len__(self) -> int:
        """Number of packs."""
        return self.facts["packs"]

    @property
    def blocks(self) -> list[int]:
        """Packs in each block of the curriculum, in its order; all in one without a curriculum."""
        return self.facts.get("blocks", [len(self)])

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "index": self.index, "facts": self.facts}

    @cached_property
    def _documents(self) -> np.ndarray:
        return mapped(self.index / DOCUMENTS, "<i8")

    @cached_property
    def _offsets(self) -> np.ndarray:
        return mapped(self.index / OFFSETS, "<i8")

    def documents(self, number: int) -> np.ndarray:
        """Numbers of the documents in a pack, in their order there, (k,) int64."""
        if not 0 <= number < len(self):
            raise IndexError(f"pack {number} of {len(self)}")
        return self._documents[self._offsets[number] : self._offsets[number + 1]]

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """One training sequence, S = seq_length positions:

        `tokens` and `labels` (S,) int64, `loss_mask` (S,) float32 (a token's weight in the loss, 0 or 1 without
        weights), `position_ids` (S,) int64 from 0 in every segment, `source` (S,) int32 (a number in
        `store.source_names`), `cu_seqlens` (segments + 1,) int32 from 0 to S, and `with_stages` the label's `stage`
        (S,) uint8. A segment is a document with its padding; the space that is left at the end is a segment of its
        own. Padding is token 0 with loss mask 0 and source `PADDING`.
        """
        return self._sequence(self.documents(number))

    def filled(self) -> np.ndarray:
        """Positions of each pack that hold a token of a document, (packs,) int64."""
        positions = (self.store.lengths() - 1)[self._documents]
        return np.diff(np.concatenate([[0], np.cumsum(positions)])[self._offsets])

    def padding(self) -> dict[str, np.ndarray]:
        """A sequence without any document: what fills a batch up and changes no sum over tokens."""
        return self._sequence(np.zeros(0, dtype=np.int64))

    def _sequence(self, documents: np.ndarray) -> dict[str, np.ndarray]:
        length, multiple = self.facts["seq_length"], self.facts["pad_multiple"]
        starts, stops = self.store.offsets[documents], self.store.offsets[documents + 1]
        sizes = stops - starts - 1
        # Segments: the documents with their padding, and the room that is left, which may be none.
        segments, places = np.empty(len(sizes) + 1, np.int64), np.full(len(sizes) + 1, PADDING, np.int32)
        segments[:-1] = sizes if multiple == 1 else -(-sizes // multiple) * multiple
        segments[-1] = length - segments[:-1].sum()
        places[:-1] = self.store.sources[documents]
        ends, source = segments.cumsum(), places.repeat(segments)
        position_ids = np.arange(length)
        position_ids -= (ends - segments).repeat(segments)
        runs, weights = self.store.runs(starts.tolist(), stops.tolist())
        gaps = (segments[:-1] - sizes).tolist() if multiple > 1 else []
        tokens = _laid_out([run[:-1] for run in runs], gaps, length, np.int64)
        # A label is the token behind; behind a document's last token that is one which the sequence does not hold.
        labels = np.zeros(length, dtype=np.int64)
        labels[:-1] = tokens[1:]
        labels[ends - 1] = 0
        labels[(ends - segments)[:-1] + sizes - 1] = [run[-1] for run in runs]
        for end, gap in zip(ends.tolist(), gaps, strict=False):
            source[end - gap : end] = PADDING
        sequence = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": _laid_out([run[1:] for run in weights], gaps, length, np.float32),
            "position_ids": position_ids,
            "source": source,
            "cu_seqlens": np.array([0, *ends[segments > 0].tolist()], dtype=np.int32),
        }
        if self.with_stages:
            stages = [self.store.stages(int(document))[1:] for document in documents]
            sequence["stage"] = _laid_out(stages, gaps, length, np.uint8)
        return sequence


def _laid_out(runs: Sequence[np.ndarray], gaps: Sequence[int], length: int, dtype: Any) -> np.ndarray:
    """The runs one after the other, each followed by its gap of zeros if there are gaps, and zeros up to `length`."""
    out = np.zeros(length, dtype=dtype)
    if gaps:
        zeros = [np.zeros(gap, run.dtype) for run, gap in zip(runs, gaps, strict=True)]
        runs = [piece for pair in zip(runs, zeros, strict=True) for piece in pair]
    if runs:
        laid = np.concatenate(runs)  # in their own type: converting while joining costs twice as much
        out[: len(laid)] = laid
    return out
