"""Writes token stores (nano3/token_store.py says what one holds)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.tokens import ChatTokenizer
from nano3.cli import UserError
from nano3.token_store import DTYPES, FILES, KIND, MANIFEST, ORDER, VERSION

MAX_WEIGHTS = 255
"""Different loss weights that one store can hold: their numbers are bytes."""


class _HashedFile:
    """A file that is written front to back, and its SHA-256 with it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


class StoreWriter:
    """Writes a token store into an existing empty folder, one document at a time and in constant memory.

    Use it inside `nano3.cli.fresh_output(out, KIND)`, so that the store appears whole or not at all. `order` names the
    row key whose value every document brings along, for packs in that order.
    """

    def __init__(self, folder: Path, order: str | None = None) -> None:
        self.folder, self.order = folder, order
        self.documents = self.tokens = self.supervised_tokens = self.longest = 0
        self.sources: dict[str, dict[str, int]] = {}
        self._source_numbers: dict[str, int] = {}
        self._origins: dict[str, int] = {}
        self._max_token = 0
        self._weights: dict[float, int] = {}
        self._files = {name: _HashedFile(folder / name) for name in [*FILES, *([ORDER] if order else [])]}
        self._files["documents.idx"].write(np.int64(0).astype("<i8").tobytes())

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
        assert len(tokens) >= 2, "nothing to predict"
        assert mask[0] == 0, "nothing predicts the first token"
        assert stages is None or stages.shape == tokens.shape, "tokens and stages belong together"
        codes = self._codes(mask)
        self._files["tokens.bin"].write(tokens.astype("<i4").tobytes())
        self._files["loss_mask.bin"].write(codes.tobytes())
        self._files["stages.bin"].write(bytes(len(tokens)) if stages is None else stages.astype("u1").tobytes())
        supervised = int(np.count_nonzero(codes))
        self.documents += 1
        self.tokens += len(tokens)
        self.supervised_tokens += supervised
        self.longest = max(self.longest, len(tokens))
        self._max_token = max(self._max_token, int(tokens.max()))
        self._files["documents.idx"].write(np.int64(self.tokens).astype("<i8").tobytes())
        counts = self.sources.setdefault(source, {"documents": 0, "tokens": 0, "supervised_tokens": 0})
        number = self._source_numbers.setdefault(source, len(self._source_numbers))
        self._files["sources.bin"].write(np.int32(number).astype("<i4").tobytes())
        file = self._origins.setdefault(origin[0], len(self._origins))
        self._files["origins.bin"].write(np.array([file, origin[1]], "<i4").tobytes())
        if self.order:
            self._files[ORDER].write(np.float64(order).astype("<f8").tobytes())
        for key, value in (("documents", 1), ("tokens", len(tokens)), ("supervised_tokens", supervised)):
            counts[key] += value

    def _codes(self, mask: np.ndarray) -> np.ndarray:
        """The weights (n,) as bytes (n,): 0, or 1 + the weight's place among those of the store."""
        values, places = np.unique(mask, return_inverse=True)
        assert np.isfinite(values).all(), "a weight is a number"
        assert values.min() >= 0, "a weight is at least 0"
        for value in values.tolist():
            if value and value not in self._weights:
                if len(self._weights) == MAX_WEIGHTS:
                    raise UserError(f"more than {MAX_WEIGHTS} different loss weights; round them, to two digits say")
                self._weights[value] = len(self._weights) + 1
        return np.array([self._weights.get(value, 0) for value in values.tolist()], dtype=np.uint8)[places]

    def finish(self, tokenizer: ChatTokenizer, **facts: Any) -> None:
        """Closes the files and writes the manifest; `facts` are JSON values to record in it, such as the inputs."""
        manifest = {
            "format": KIND,
            "version": VERSION,
            "documents": self.documents,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "longest_document": self.longest,
            "max_token_id": self._max_token,
            "sources": self.sources,
            "weights": list(self._weights) or [1.0],
            "origins": list(self._origins),
            "order": self.order,
            "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
            "files": {name: {"dtype": DTYPES[name], **file.close()} for name, file in self._files.items()},
            **facts,
        }
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def close(self) -> None:
        """Closes the files without a manifest: what a failed run does, so that no reader takes it for a store."""
        for file in self._files.values():
            file.close()
