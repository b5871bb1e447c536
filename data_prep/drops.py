"""What was left out of a data set, and why: every row by a reason, with its count and the first examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from typing_extensions import TypedDict

from nano3.documents import Count, Name, Text

EXAMPLES = 3
"""Examples kept for each reason."""
_SHOWN = 70
"""Characters of an example's text."""


class Dropped(TypedDict):
    """One reason as `Drops.facts` tells it."""

    reason: Text
    rows: Count
    examples: list[dict[Name, Text]]


class Drops:
    """Rows that were left out, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, list[dict[str, str]]] = {}

    def add(self, reason: str, where: str, text: str) -> None:
        """Counts a row; `where` it stood and the start of its `text` are kept of the first ones."""
        self.counts[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            text = " ".join(text.split())
            examples.append({"where": where, "text": text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."})

    def merge(self, facts: Iterable[Mapping[str, Any]]) -> None:
        """Adds what `facts` of later rows says."""
        for fact in facts:
            self.counts[fact["reason"]] += fact["rows"]
            examples = self._examples.setdefault(fact["reason"], [])
            examples += fact["examples"][: EXAMPLES - len(examples)]

    @property
    def total(self) -> int:
        """Rows that were left out."""
        return self.counts.total()

    def facts(self) -> list[dict[str, Any]]:
        """Reasons with counts and examples, as JSON values; the most frequent first."""
        return [
            {"reason": reason, "rows": count, "examples": self._examples[reason]}
            for reason, count in self.counts.most_common()
        ]

    def lines(self) -> list[str]:
        """The same for people."""
        lines = []
        for fact in self.facts():
            lines.append(f"  left out, {fact['reason']}: {fact['rows']:,}")
            lines += [f"    {example['where']}: {example['text']}" for example in fact["examples"]]
        return lines
