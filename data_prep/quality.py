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
from nano3.conversations import Conversation, conversation

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


@dataclass(frozen=True)
class Candidate:
    """A row, and the `text` of it that is compared with others', as `normalized` gives it."""

    row: Conversation
    text: str

    @classmethod
    def of(cls, row: Conversation) -> Candidate:
        """The candidate that a row is."""
        return cls(row, normalized(compared_text(row)))

    def stored(self, fields: Any) -> str:
        """A line for the scratch file; `fields` are the row's own."""
        return json.dumps([fields, self.row.where, self.row.source, self.text]) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Candidate:
        """What `stored` wrote."""
        fields, where, source, text = json.loads(line)
        return cls(conversation(fields, where, source), text)


def reason_alone(one: Candidate, limits: Limits, held_out: Sequence[tuple[str, HeldOut]]) -> str | None:
    """Why a row is dropped whatever the other rows are, or None."""
    row = one.row
    count = sum(len(str(message["content"]).split()) for message in row.messages)
    count += sum(len(message.get("reasoning_content", "").split()) for message in row.messages)
    if count < limits.fewest_words:
        return f"fewer than {limits.fewest_words} words"
    if limits.most_words is not None and count > limits.most_words:
        return f"more than {limits.most_words} words"
    if repetition(row) > limits.repetition:
        return f"an answer of which more than {limits.repetition:.0%} repeats"
    for name, questions in held_out:
        match = questions.match_normalized(one.text)
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

    def read(self, one: Candidate) -> None:
        """Notes the row's answer."""
        if "answer" in one.row.fields:
            answer, key = hash(str(one.row.fields["answer"])), hash(one.text)
            self._answers[key] = answer if self._answers.get(key, answer) == answer else None

    def contradicts(self, one: Candidate) -> bool:
        """Whether its question has another answer elsewhere."""
        return "answer" in one.row.fields and self._answers[hash(one.text)] is None


class Templates:
    """The 3-grams that belong to the wording of a source, learned from its first rows."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[Gram]] = {}
        self._rows: Counter[str] = Counter()

    def read(self, one: Candidate) -> None:
        """Counts a row's 3-grams."""
        source = one.row.source
        if self._rows[source] < SAMPLE:
            self._rows[source] += 1
            self._counts.setdefault(source, Counter()).update(grams_of(words_of(one.text)))

    def content(self, source: str, text: str) -> frozenset[Gram]:
        """The 3-grams of a text of `source` without those of its template."""
        counts, least = self._counts[source], max(TEMPLATE_LEAST, GRAM_SHARE * self._rows[source])
        return frozenset(gram for gram in grams_of(words_of(text)) if counts.get(gram, 0) < least)


class NearDuplicates:
    """Rows that came before, by their signatures; `scratch` gives the text of one again to confirm a match."""

    def __init__(self, scratch: IO[str], limit: float, templates: Templates) -> None:
        import rensa

        self._minhash = rensa.RMinHash
        self._index = rensa.RMinHashLSH(threshold=min(limit, 1.0), num_perm=PERMUTATIONS, num_bands=BANDS)
        self._scratch, self._limit, self._templates = scratch, limit, templates
        self._exact: set[int] = set()
        self._places: list[int] = []

    def reasons(self, several: Sequence[Candidate], places: Sequence[int]) -> Iterator[str | None]:
        """Why each of some rows is dropped, or None; `places` are their offsets in the scratch file."""
        contents = [self._templates.content(one.row.source, one.text) for one in several]
        tokens = [[" ".join(gram) for gram in content] for content in contents]
        signatures = self._minhash.from_token_sets(tokens, PERMUTATIONS, SEED)
        for one, place, content, signature in zip(several, places, contents, signatures, strict=True):
            yield self._reason(one, place, content, signature)

    def _reason(self, one: Candidate, place: int, content: frozenset[Gram], signature: Any) -> str | None:
        key = hash(one.text + "\n" + json.dumps(one.row.messages[-1], sort_keys=True))
        if key in self._exact:
            return "exact duplicate of a row before"
        if content and self._limit <= 1:
            for number in self._index.query(signature):
                other = self._content_at(self._places[number])
                shared = len(content & other)
                if shared >= self._limit * (len(content) + len(other) - shared):
                    return "near duplicate of a row before"
            self._index.insert(len(self._places), signature)
        self._exact.add(key)
        self._places.append(place)
        return None

    def _content_at(self, place: int) -> frozenset[Gram]:
        self._scratch.seek(place)
        _, _, source, text = json.loads(self._scratch.readline())
        return self._templates.content(source, text)


def kept(
    scratch: IO[str], places: Iterable[int], limits: Limits, templates: Templates, answers: Consistency, drops: Drops
) -> Iterator[int]:
    """The offsets, of those in `places`, of rows that stay."""
    near = NearDuplicates(scratch, limits.near, templates)
    waiting: list[tuple[int, Candidate]] = []

    def settled() -> Iterator[int]:
        several, where = [one for _, one in waiting], [place for place, _ in waiting]
        for (place, one), reason in zip(waiting, near.reasons(several, where), strict=True):
            if reason:
                drops.add(reason, one.row.where, one.row.question)
            else:
                yield place
        waiting.clear()

    for place in places:
        scratch.seek(place)
        one = Candidate.from_line(scratch.readline())
        if limits.consistent and answers.contradicts(one):
            drops.add("the same question has another answer elsewhere", one.row.where, one.row.question)
            continue
        waiting.append((place, one))
        if len(waiting) == BATCH:
            yield from settled()
    yield from settled()
