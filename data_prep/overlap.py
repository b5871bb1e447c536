"""Contamination: which training questions are, or nearly are, held-out questions.

The user's words are compared with the options of a choice, not system prompts or answers. Two questions are

* an exact match when they are equal after Unicode NFKC, case folding and collapsing white space;
* near duplicates when they have the same words in any order (see `_bag`: of questions with two numbers or more, the
  same numbers and operators and the same words beside the prompt template), or when the Jaccard index of their sets of
  word 3-grams, the template's taken out, is 0.7 or more.

The template is found, not configured: 3-grams in a tenth, and words in three tenths, of the held-out questions of one
source (and in five of them at least) are the task's wording and say nothing about one question. Without this step the
shared wording alone makes most questions of a generated task look alike. Every pair that shares a 3-gram is compared
exactly through an inverted index of the held-out set; nothing is sampled or hashed.

Not found: the same problem in other words, and different questions with one answer (a text in another cipher).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.chat_rows import read_conversations
from nano3.conversations import Conversation

NEAR_JACCARD = 0.7
"""Jaccard index from which two questions are near duplicates; the usual threshold of MinHash deduplication."""

GRAM_SHARE, WORD_SHARE, TEMPLATE_LEAST = 0.1, 0.3, 5
"""Share of a source's questions from which a 3-gram, and a word, belong to its template; and the least count."""

Gram = tuple[str, ...]
_WORD = re.compile(r"-?\d+(?:\.\d+)?|[^\W\d_]+|[-+*/=<>^%&|~]")


@dataclass
class Overlap:
    """Pairs (training id, held-out id), and how many questions were compared."""

    training: int = 0
    held_out: int = 0
    exact: list[tuple[str, str]] = field(default_factory=list)
    near: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{len(self.exact)} exact, {len(self.near)} near duplicates "
            f"between {self.training} training and {self.held_out} held-out questions"
        )


def normalized(text: str) -> str:
    """Text as the exact comparison sees it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def compared_text(row: Conversation) -> str:
    """What of a row is compared: the user's words, and the options of a choice that are not in them."""
    choices = row.fields.get("choices")
    return with_options(row.question, choices if isinstance(choices, list) else [])


def with_options(question: str, choices: Sequence[Any]) -> str:
    """A question and those of its options that are not in it."""
    return " ".join([question, *(str(choice) for choice in choices if str(choice) not in question)])


class HeldOut:
    """Held-out questions, ready to be compared with any number of training questions."""

    def __init__(self, conversations: Iterable[Conversation]) -> None:
        self._held = [(row.id, row.source, normalized(compared_text(row))) for row in conversations]
        self._exact = {text: identity for identity, _, text in self._held}
        by_source = defaultdict(list)
        for _, source, text in self._held:
            by_source[source].append(words_of(text))
        self._template_grams = {s: _common(map(grams_of, texts), GRAM_SHARE) for s, texts in by_source.items()}
        self._template_words = {s: _common(map(set, texts), WORD_SHARE) for s, texts in by_source.items()}
        self._bags: dict[tuple[str, Gram], str] = {}
        self._content: list[set[Gram]] = []
        self._index: dict[Gram, list[int]] = defaultdict(list)
        for number, (identity, source, text) in enumerate(self._held):
            words = words_of(text)
            self._bags[source, _bag(words, self._template_words[source])] = identity
            self._content.append(grams_of(words) - self._template_grams[source])
            for gram in self._content[-1]:
                self._index[gram].append(number)

    def __len__(self) -> int:
        return len(self._held)

    def match(self, question: str) -> tuple[str, str] | None:
        """("exact" or "near", id of a held-out question) for a training question, or None."""
        return self.match_normalized(normalized(question))

    def match_normalized(self, text: str) -> tuple[str, str] | None:
        """`match` of a question that is as `normalized` gives it already."""
        if text in self._exact:
            return "exact", self._exact[text]
        words = words_of(text)
        for source, template in self._template_words.items():
            same = self._bags.get((source, _bag(words, template)))
            if same is not None:
                return "near", same
        grams = grams_of(words)
        shared = Counter(number for gram in grams for number in self._index.get(gram, ()))
        for number, count in shared.most_common():
            identity, source, _ = self._held[number]
            union = len(self._content[number]) + len(grams - self._template_grams[source]) - count
            if count >= NEAR_JACCARD * union:
                return "near", identity
        return None


def distinct_new(
    rows: Iterable[dict[str, Any]], size: int, held_out: HeldOut | None = None
) -> Iterator[dict[str, Any]]:
    """The first `size` rows whose questions are distinct and match nothing in `held_out`; fewer when `rows` end."""
    seen: set[str] = set()
    for row in rows:
        if len(seen) == size:
            return
        question = normalized(row["messages"][0]["content"])
        if question not in seen and not (held_out and held_out.match_normalized(question)):
            seen.add(question)
            yield row


def find_overlap(training: Iterable[Conversation], held_out: Iterable[Conversation]) -> Overlap:
    """Every training question that is, or nearly is, a held-out one; the training set is streamed."""
    held = HeldOut(held_out)
    overlap = Overlap(held_out=len(held))
    for row in training:
        overlap.training += 1
        match = held.match(compared_text(row))
        if match:
            (overlap.exact if match[0] == "exact" else overlap.near).append((row.id, match[1]))
    return overlap


def overlap_of_files(training: Path | str, held_out: Path | str) -> Overlap:
    """`find_overlap` of two inputs in any form."""
    return find_overlap(read_conversations(training), read_conversations(held_out))


def words_of(text: str) -> list[str]:
    """Numbers, words and arithmetic operators; other punctuation says nothing."""
    return _WORD.findall(text)


def grams_of(words: list[str]) -> set[Gram]:
    """Word 3-grams; a shorter text is one gram."""
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def _bag(words: list[str], template: set) -> Gram:
    """The words without their order. Where two numbers or more make the question, its template does not count."""
    if sum(word[-1].isdigit() for word in words) >= 2:
        words = [word for word in words if word not in template or not word.isalpha()]
    return tuple(sorted(words))


def _common(sets: Iterable[set], share: float) -> set:
    """Elements that are in at least `share` of the sets, and in `TEMPLATE_LEAST` of them."""
    sets = list(sets)
    counts = Counter(element for one in sets for element in one)
    return {element for element, count in counts.items() if count >= max(TEMPLATE_LEAST, share * len(sets))}
