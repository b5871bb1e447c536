"""gigatoken in the place of `tokenizers`: the same ids, many times as fast on long texts; held to them all the way.

An optional package (`pip install gigatoken==0.10.0`), and a beta. So its ids are compared with those of `tokenizers`
when it loads, and for one text in `EVERY` from then on. The first difference ends the preparation and is shown.

It remembers every word that it has met, without a bound. When the process has grown by `GROWTH` bytes since it was
loaded, it is loaded again, which gives that memory back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nano3.cli import UserError

NAME = "gigatoken"
EVERY = 1000
GROWTH = 32 << 20
PROBES = (
    "", " ", "\n", "\n\n", "a\n\n\tb", "Hello, world!  What's  this?", "x = [1, 23, 456_789]  # 3.14e-10\r\n",
    "Größe, naïve, façade, cafe\u0301", "日本語のテキスト。", "Привет мир", "مرحبا", "🙂👩‍👩‍👧", "∀x∈ℝ: ⌈x⌉ = ½",
    "\u00a0\u2003\u200b",
    "<think>\n", "</think>", "<|im_start|>user\n", "a<|im_end|>\n", "A" * 300,
)  # fmt: skip
"""What tokenizers cut differently where they differ: blanks, digits, marks, scripts, composed characters, controls."""

Ids = Callable[[Sequence[str]], list[list[int]]]


class Gigatoken:
    """Encodes texts with gigatoken; `reference` gives the ids that must come out.

    Raises `UserError` when the package is missing, cannot take the tokenizer, or gives other ids for a probe.
    """

    def __init__(self, path: Path, reference: Ids) -> None:
        try:
            import gigatoken
        except ModuleNotFoundError:
            raise UserError(
                "--backend gigatoken: the package is not installed; pip install gigatoken==0.10.0, or leave it out"
            ) from None
        self._path, self._reference, self._make = path, reference, gigatoken.Tokenizer.from_json
        self._texts = 0
        self._load()
        self._compare(PROBES)

    def _load(self) -> None:
        try:
            self._encoder: Any = self._make(self._path.read_text())
        except Exception as error:
            raise UserError(f"gigatoken cannot take {self._path} ({error}); leave --backend gigatoken out") from error
        self._bound = _resident() + GROWTH

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. Raises `UserError` for a compared text whose ids differ."""
        given = list(texts)
        found = self._encoder.encode_batch_list(given)
        first = -self._texts % EVERY
        self._texts += len(given)
        self._compare(given[first::EVERY], found[first::EVERY])
        if _resident() > self._bound:
            del self._encoder
            self._load()
        return found

    def _compare(self, texts: Sequence[str], found: list[list[int]] | None = None) -> None:
        ours = self._encoder.encode_batch_list(list(texts)) if found is None else found
        for text, one, other in zip(texts, ours, self._reference(list(texts)), strict=True):
            if one != other:
                place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
                raise UserError(
                    f"gigatoken gives other ids than tokenizers for {text[:200]!r}, from token {place} on: "
                    f"{one[place : place + 5]} and {other[place : place + 5]}; leave --backend gigatoken out"
                )


def _resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def version() -> str:
    """Name and version, for a store's manifest."""
    from importlib.metadata import version

    return f"{NAME} {version(NAME)}"
