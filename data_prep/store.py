"""Writes token stores (nano3/token_store.py says what one holds)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.tokens import ChatTokenizer, EncodedBatch
from nano3.cli import UserError
from nano3.token_store import DTYPES, FILES, KIND, MANIFEST, ORDER, VERSION

MAX_WEIGHTS = 255
"""Different loss weights that one store can hold: their numbers are bytes."""


class HashedFile:
    """A file that is written front to back, and its SHA-256 with it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += data.nbytes

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


class StoreWriter:
    """Writes a token store into an existing empty folder, in constant memory.

    Use it inside `nano3.outputs.fresh_output(out, KIND)`, so that the store appears whole or not at all. `order` names
    the row key whose value every document brings along, for packs in that order.
    """

    def __init__(self, folder: Path, order: str | None = None) -> None:
        self.folder, self.order = folder, order
        self.documents = self.tokens = self.supervised_tokens = self.longest = 0
        self.sources: dict[str, dict[str, int]] = {}
        self._origins: dict[str, int] = {}
        self._max_token = 0
        self._weights: dict[float, int] = {}
        self._files = {name: HashedFile(folder / name) for name in [*FILES, *([ORDER] if order else [])]}
        self._write("documents.idx", np.zeros(1))

    def add(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        source: str,
        stages: np.ndarray | None = None,
        origin: tuple[str, int] = ("", 0),
        order: float = 0.0,
    ) -> None:
        """Appends a document.

        Args:
            tokens: (n,), n >= 2. The first is never predicted.
            mask: (n,), what the loss multiplies each token by: 0 or 1, or any weights of at least 0.
            source: whose losses its tokens count among.
            stages: (n,), 0 to 255; without it all 0.
            origin: file and row that it was made of.
            order: its value of the row key that the store keeps.

        Raises:
            UserError: more than `MAX_WEIGHTS` different weights in the store.
        """
        assert tokens.shape == mask.shape == (len(tokens),), "tokens and mask belong together"
        assert stages is None or stages.shape == tokens.shape, "tokens and stages belong together"
        stages = np.zeros(len(tokens), np.uint8) if stages is None else stages
        lengths = np.array([len(tokens)])
        self.add_batch(EncodedBatch(tokens, mask, stages, lengths), [source], [origin], [order])

    def add_batch(
        self,
        batch: EncodedBatch,
        sources: Sequence[str],
        origins: Sequence[tuple[str, int]],
        orders: Sequence[float] = (),
    ) -> None:
        """Appends documents, each as `add` has it; `orders` only where the store keeps a row key."""
        lengths, starts = batch.lengths, np.cumsum(batch.lengths) - batch.lengths
        assert lengths.min() >= 2, "nothing to predict"
        assert not batch.mask[starts].any(), "nothing predicts the first token"
        codes = self._codes(batch.mask, starts)
        supervised = np.add.reduceat(codes != 0, starts, dtype=np.int64)
        for source in dict.fromkeys(sources):
            self.sources.setdefault(source, {"documents": 0, "tokens": 0, "supervised_tokens": 0})
        number_of = {source: number for number, source in enumerate(self.sources)}
        numbers = np.fromiter((number_of[source] for source in sources), np.int32, len(sources))
        for key, amounts in (("documents", None), ("tokens", lengths), ("supervised_tokens", supervised)):
            sums = np.bincount(numbers, weights=amounts, minlength=len(self.sources))  # exact: far below 2^53
            for counts, amount in zip(self.sources.values(), sums.tolist(), strict=True):
                counts[key] += int(amount)
        for file, _ in origins:
            self._origins.setdefault(file, len(self._origins))
        rows = np.array([(self._origins[file], row) for file, row in origins], "<i4")
        self._write("tokens.bin", batch.tokens)
        self._write("loss_mask.bin", codes)
        self._write("stages.bin", batch.stages)
        self._write("documents.idx", self.tokens + np.cumsum(lengths))
        self._write("sources.bin", numbers)
        self._write("origins.bin", rows)
        if self.order:
            self._write(ORDER, np.asarray(orders))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.supervised_tokens += int(supervised.sum())
        self.longest = max(self.longest, int(lengths.max()))
        self._max_token = max(self._max_token, int(batch.tokens.max()))

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(values.astype(DTYPES[name], copy=False).data)

    def _codes(self, mask: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The weights (n,) as bytes (n,): 0, or 1 + the weight's place among those of the store."""
        codes = np.zeros(len(mask), dtype=np.uint8)
        for value, code in self._weights.items():
            codes[mask == value] = code
        if np.count_nonzero(codes) < np.count_nonzero(mask):
            # New weights get their numbers document by document, in each the smallest first.
            for document in np.split(mask, starts[1:]):
                self._number(np.unique(document).tolist())
            return self._codes(mask, starts)
        return codes

    def _number(self, values: Sequence[float]) -> None:
        for value in values:
            assert 0 <= value < float("inf"), "a weight is a number of at least 0"
            if value and value not in self._weights:
                if len(self._weights) == MAX_WEIGHTS:
                    raise UserError(f"more than {MAX_WEIGHTS} different loss weights; round them, to two digits say")
                self._weights[value] = len(self._weights) + 1

    def finish(self, tokenizer: ChatTokenizer, **facts: Any) -> None:
        """Closes the files and writes the manifest; `facts` are JSON values to record in it, such as the inputs."""
        content = self.facts()
        write_manifest(self.folder, content, identity(tokenizer), content["files"], **facts)

    def facts(self) -> dict[str, Any]:
        """Closes the files; what was written, as a manifest says it."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "longest_document": self.longest,
            "max_token_id": self._max_token,
            "sources": self.sources,
            "weights": list(self._weights) or [1.0],
            "origins": list(self._origins),
            "order": self.order,
            "files": {name: {"dtype": DTYPES[name], **file.close()} for name, file in self._files.items()},
        }

    def close(self) -> None:
        """Closes the files without a manifest: what a failed run does, so that no reader takes it for a store."""
        for file in self._files.values():
            file.close()


def identity(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What a manifest says of the tokenizer."""
    return {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}


def write_manifest(
    folder: Path, content: dict[str, Any], tokenizer: dict[str, Any], files: dict[str, Any], **facts: Any
) -> None:
    """Writes manifest.json: `content` as `StoreWriter.facts` has it, but with these files, and more facts."""
    counted = {key: value for key, value in content.items() if key != "files"}
    manifest = {"format": KIND, "version": VERSION, **counted, "tokenizer": tokenizer, "files": files, **facts}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
