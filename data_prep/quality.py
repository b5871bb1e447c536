"""What makes a row unfit for training: a copy of another row or of a held-out question, a contradiction, a bad length,
an answer that repeats itself.

Near duplicates inside training are questions whose sets of word 3-grams, the template's taken out, have a Jaccard index
of the limit or more. MinHash with locality-sensitive hashing (`rensa`; 128 permutations in 32 bands, so that a pair at
0.7 is missed once in 6,000) only proposes pairs; each is confirmed by its exact index, and the signatures are in memory
only. Of a group the first row stays.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from data_prep.drops import Drops
from data_prep.overlap import GRAM_SHARE, TEMPLATE_LEAST, Gram, HeldOut, compared_text, grams_of, normalized, words_of
from nano3.conversations import Conversation

PERMUTATIONS, BANDS, SEED = 128, 32, 42
BATCH = 512
"""Rows whose signatures are computed together."""
SAMPLE = 20_000
"""Rows of a source from which its template is learned."""
REPEATED_WORDS = 10
"""Length of the runs of words that count as repetition; shorter ones repeat in any text."""


@dataclass(frozen=True)
class Limits:
    """What a row may be.

    Args:
        near: Jaccard index from which two questions are near duplicates; above 1 none are.
        fewest_words, most_words: of a whole conversation.
        repetition: largest share of an answer's runs of `REPEATED_WORDS` words that stand in it twice.
        consistent: whether a question with two different answers is dropped; for rows with an `answer` only, since of a
            free answer many may be right.
    """

    near: float = 0.8
    fewest_words: int = 0
    most_words: int | None = None
    repetition: float = 0.3
    consistent: bool = True


def reason_alone(row: Conversation, limits: Limits, held_out: Sequence[tuple[str, HeldOut]]) -> str | None:
    """Why a row is dropped whatever the other rows are, or None."""
    count = sum(len(str(message["content"]).split()) for message in row.messages)
    count += sum(len(message.get("reasoning_content", "").split()) for message in row.messages)
    if count < limits.fewest_words:
        return f"fewer than {limits.fewest_words} words"
    if limits.most_words is not None and count > limits.most_words:
        return f"more than {limits.most_words} words"
    if repetition(row) > limits.repetition:
        return f"an answer of which more than {limits.repetition:.0%} repeats"
    for name, questions in held_out:
        match = questions.match(compared_text(row))
        if match:
            return f"{match[0]} duplicate of a question of {name}"
    return None


def repetition(row: Conversation) -> float:
    """Share, in the assistant turn that repeats most, of runs of `REPEATED_WORDS` words that were there before."""
    worst = 0.0
    for message in row.messages:
        if message["role"] == "assistant":
            said = f"{message.get('reasoning_content', '')} {message['content']}".split()
            runs = [tuple(said[start : start + REPEATED_WORDS]) for start in range(len(said) - REPEATED_WORDS + 1)]
            worst = max(worst, 1 - len(set(runs)) / len(runs) if runs else 0.0)
    return worst


class Consistency:
    """Answers by question: finds the questions that have two."""

    def __init__(self) -> None:
        self._answers: dict[int, int | None] = {}

    @staticmethod
    def _key(row: Conversation) -> int:
        return hash(normalized(compared_text(row)))

    def read(self, row: Conversation) -> None:
        """Notes the row's answer."""
        if "answer" in row.fields:
            answer = hash(str(row.fields["answer"]))
            key = self._key(row)
            self._answers[key] = answer if self._answers.get(key, answer) == answer else None

    def contradicts(self, row: Conversation) -> bool:
        """Whether its question has another answer elsewhere."""
        return "answer" in row.fields and self._answers[self._key(row)] is None


class Templates:
    """The 3-grams that belong to the wording of a source, learned from its first rows."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[Gram]] = {}
        self._rows: Counter[str] = Counter()

    def read(self, row: Conversation) -> None:
        """Counts a row's 3-grams."""
        if self._rows[row.source] < SAMPLE:
            self._rows[row.source] += 1
            self._counts.setdefault(row.source, Counter()).update(grams_of(words_of(normalized(compared_text(row)))))

    def content(self, row: Conversation) -> frozenset[Gram]:
        """The row's 3-grams without its source's template."""
        counts, least = self._counts[row.source], max(TEMPLATE_LEAST, GRAM_SHARE * self._rows[row.source])
        return frozenset(
            gram for gram in grams_of(words_of(normalized(compared_text(row)))) if counts.get(gram, 0) < least
        )


class NearDuplicates:
    """Rows that came before, by their signatures; `scratch` gives the text of one again to confirm a match."""

    def __init__(self, scratch: IO[str], limit: float, templates: Templates) -> None:
        import rensa

        self._minhash = rensa.RMinHash
        self._index = rensa.RMinHashLSH(threshold=min(limit, 1.0), num_perm=PERMUTATIONS, num_bands=BANDS)
        self._scratch, self._limit, self._templates = scratch, limit, templates
        self._exact: dict[int, str] = {}
        self._places: list[int] = []

    def reasons(self, rows: Sequence[Conversation], places: Sequence[int]) -> Iterator[str | None]:
        """Why each of some rows is dropped, or None; `places` are their offsets in the scratch file."""
        contents = [self._templates.content(row) for row in rows]
        tokens = [[" ".join(gram) for gram in content] for content in contents]
        signatures = self._minhash.from_token_sets(tokens, PERMUTATIONS, SEED)
        for row, place, content, signature in zip(rows, places, contents, signatures, strict=True):
            yield self._reason(row, place, content, signature)

    def _reason(self, row: Conversation, place: int, content: frozenset[Gram], signature: Any) -> str | None:
        key = hash(normalized(compared_text(row)) + "\n" + json.dumps(row.messages[-1], sort_keys=True))
        if key in self._exact:
            return "exact duplicate of a row before"
        if content and self._limit <= 1:
            for number in self._index.query(signature):
                other = self._templates.content(self._row_at(self._places[number]))
                shared = len(content & other)
                if shared >= self._limit * (len(content) + len(other) - shared):
                    return "near duplicate of a row before"
            self._index.insert(len(self._places), signature)
        self._exact[key] = row.where
        self._places.append(place)
        return None

    def _row_at(self, place: int) -> Conversation:
        self._scratch.seek(place)
        return stored(self._scratch.readline())


def stored(line: str) -> Conversation:
    """A row of the scratch file."""
    from nano3.conversations import conversation

    fields, where, source = json.loads(line)
    return conversation(fields, where, source)


def kept(
    scratch: IO[str], places: Iterable[int], limits: Limits, templates: Templates, answers: Consistency, drops: Drops
) -> Iterator[int]:
    """The offsets, of those in `places`, of rows that stay."""
    near = NearDuplicates(scratch, limits.near, templates)
    waiting: list[tuple[int, Conversation]] = []

    def settled() -> Iterator[int]:
        rows = [row for _, row in waiting]
        for (place, row), reason in zip(waiting, near.reasons(rows, [place for place, _ in waiting]), strict=True):
            if reason:
                drops.add(reason, row.where, row.question)
            else:
                yield place
        waiting.clear()

    for place in places:
        scratch.seek(place)
        row = stored(scratch.readline())
        if limits.consistent and answers.contradicts(row):
            drops.add("the same question has another answer elsewhere", row.where, row.question)
            continue
        waiting.append((place, row))
        if len(waiting) == BATCH:
            yield from settled()
    yield from settled()
