"""A token store of random documents, for tests that only need batches."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data_prep.store import StoreWriter
from nano3.outputs import fresh_output
from nano3.token_store import KIND


def tiny_store(
    path: Path,
    documents: int,
    longest: int,
    vocab_size: int,
    seed: int = 0,
    tokenizer: str = "0" * 64,
    multiple: int = 1,
) -> Path:
    """Writes `documents` of 2 to `longest` random tokens; about half are supervised, the last of each always.

    Each fills a `multiple` of positions, of which it has one less than tokens.
    """
    rng = np.random.default_rng(seed)
    with fresh_output(path, KIND) as folder:
        writer = StoreWriter(folder)
        for _ in range(documents):
            length = (int(rng.integers(2, longest + 1)) + multiple - 2) // multiple * multiple + 1
            mask = (rng.random(length) < 0.5).astype(np.uint8)
            mask[0], mask[-1] = 0, 1
            writer.add(rng.integers(3, vocab_size, length), mask, "random")
        writer.finish(SimpleNamespace(sha256=tokenizer, vocab_size=vocab_size))  # type: ignore[arg-type]
    return path
