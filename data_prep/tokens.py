"""From rendered conversations to token ids, loss mask and stages, by a `tokenizer.json` and nothing else.

Text is rendered first and encoded in batches, about twice as fast as applying a chat template row by row. Segments are
encoded one by one, because at inference too the prompt is encoded alone and the model's words follow it. That this
equals encoding the whole text is checked, not assumed: `ChatTokenizer` probes the tokenizer when it loads one, and
every document whose boundary has no control token beside it when it encodes. The spans of a segment do not cut it:
they fall on tokens of the whole segment, or are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding
from tokenizers.normalizers import NFC, NFD, NFKC, NFKD

from data_prep.chat import Segment, Span, text_of
from data_prep.chat_formats import format_of
from data_prep.gigatokens import NAME, Gigatoken, Ids, version
from nano3.cli import UserError
from nano3.token_store import TokenStore, meaning_sha256, open_tokenizer, tokenizer_file

TOKENIZERS = "tokenizers"
BACKENDS = (TOKENIZERS, NAME)
"""What may encode."""
_NORMAL_FORMS = (NFC, NFD, NFKC, NFKD)
"""Normalizers that leave ASCII as it is."""
_HEAD = 32
"""Characters after a boundary that settle how text splits there: pre-tokenizers look at one word or blank run."""


_MARKS = {"\n": "<think>", "\n\n": "</think>"}
"""White space behind which what the model writes begins, and the mark before it."""
_OPEN = tuple(mark + before for before, mark in _MARKS.items())

_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _SHOWN} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_SHOWN)))
}
"""Byte-level tokenizers write each byte as one character: itself where it can be seen, else one from 256 on."""


class Encoded(NamedTuple):
    """One document: `tokens` (n,) int32, `mask` (n,) float32, each token's weight in the loss, and `stages` (n,) uint8.

    A weight is 0 where the model did not write the token, and 1 where it did unless the message or a span of it has
    another `weight`. A stage is 0 outside the spans that have one.
    """

    tokens: np.ndarray
    mask: np.ndarray
    stages: np.ndarray


class EncodedBatch(NamedTuple):
    """Documents one after the other, as `Encoded` has each; `lengths` (documents,) int64 are their tokens."""

    tokens: np.ndarray
    mask: np.ndarray
    stages: np.ndarray
    lengths: np.ndarray


class ChatTokenizer:
    """A tokenizer that is known to fit its chat format, `format`.

    Raises `UserError` when the file cannot be read, when a control token of the format is missing or has another id
    than the model's, or when text next to a control token is not encoded as it is alone. `backend` is what encodes:
    `tokenizers`, or `gigatoken` (data_prep/gigatokens.py), which must give the same ids.
    """

    def __init__(self, folder: Path | str, backend: str = TOKENIZERS) -> None:
        self.path = tokenizer_file(folder)
        self._tokenizer = open_tokenizer(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.format = format_of(self._tokenizer)
        self._tokenizer.post_processor = None  # it may shorten the places of tokens by the blanks in them
        self._bytes: dict[int, bytes] = {}
        self._added = self._tokenizer.get_added_tokens_decoder()
        added = sorted((token.content for token in self._added.values()), key=len, reverse=True)
        self._reserved = re.compile("|".join(map(re.escape, added)))
        self._marks = {mark: [number] for mark, number in self.format.control_tokens.items()}
        self._cuts = re.compile(f"({'|'.join(map(re.escape, sorted(self._marks, key=len, reverse=True)))})")
        self.backend = backend
        self._ids: Ids = self._plain_ids
        if backend == NAME:
            self._ids = Gigatoken(self.path, self._plain_ids).ids
        self._check_control_tokens()
        self._check_boundaries()

    @cached_property
    def sha256(self) -> str:
        """Its identity in a store's manifest."""
        return meaning_sha256(self._tokenizer)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer can give."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def check_made(self, store: TokenStore) -> None:
        """Refuses a store that another tokenizer made."""
        store.check_tokenizer(self.path.parent, self._tokenizer)

    def check_texts(self, texts: Iterable[str]) -> None:
        """Refuses a text of a conversation's own in which this tokenizer reads a token of its added ones."""
        for text in texts:
            found = self._reserved.search(text)
            if found:
                raise UserError(
                    f"{text[max(0, found.start() - 20) : found.end() + 20]!r} contains {found.group()}, "
                    "which this tokenizer reads as a token of its own kind; remove it or write it differently"
                )

    def backend_facts(self) -> dict[str, str]:
        """What a manifest says of the backend: nothing of `tokenizers`."""
        return {"backend": version()} if self.backend == NAME else {}

    def is_added(self, token: int) -> bool:
        """Whether it is one of the added tokens, control tokens among them."""
        return token in self._added

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; those of one character may be spread over several tokens."""
        if token not in self._bytes:
            text = self._tokenizer.id_to_token(token) or ""
            literal = token in self._added or not all(character in _BYTES for character in text)
            self._bytes[token] = text.encode() if literal else bytes(_BYTES[character] for character in text)
        return self._bytes[token]

    def encode(self, documents: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Each document of `encode_batch` by itself."""
        batch = self.encode_batch(documents)
        ends = np.cumsum(batch.lengths)[:-1]
        parts = (np.split(values, ends) for values in (batch.tokens, batch.mask, batch.stages))
        return [Encoded(*document) for document in zip(*parts, strict=True)]

    def encode_batch(self, documents: Sequence[Sequence[Segment]], places: Sequence[str] | None = None) -> EncodedBatch:
        """Token ids, mask and stages of all documents, one after the other; a text that comes again is encoded once.

        `places` says where each document comes from, for errors. Raises `UserError` where encoding by segments differs
        from encoding the whole text, and for a span that begins or ends inside a token.
        """
        self._check_open_boundaries(documents, places)
        segments = [segment for document in documents for segment in document]
        tokens, sizes = self._encode_texts([segment.text for segment in segments])
        mask = np.fromiter((segment.weight for segment in segments), np.float32, len(segments)).repeat(sizes)
        stages = np.zeros(len(tokens), dtype=np.uint8)
        # Where each document's segments begin, and each segment's tokens.
        firsts = np.cumsum([0, *map(len, documents)])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        for number, document in enumerate(documents):
            if any(segment.spans for segment in document):
                with _placed(places, number):
                    self._mark_spans(document, starts[firsts[number] :].tolist(), mask, stages)
        return EncodedBatch(tokens, mask, stages, np.diff(starts[firsts]))

    def _encode_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts, one after the other, (n,) int32, and how many each has, (texts,) int64.

        Control tokens cut the texts (`_check_boundaries`), so only what stands between them is encoded, each once.
        """
        pieces = [self._cuts.split(text) for text in texts]
        words = [word for word in dict.fromkeys(chain.from_iterable(pieces)) if word not in self._marks]
        ids_of = dict(zip(words, self._ids(words), strict=True)) | self._marks
        ids = [ids_of[word] for word in chain.from_iterable(pieces)]
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        counts = np.fromiter(map(len, pieces), np.int64, len(pieces))
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(sizes.sum()))
        return tokens, np.add.reduceat(sizes, np.cumsum(counts) - counts)

    def _mark_spans(
        self, segments: Sequence[Segment], starts: Sequence[int], mask: np.ndarray, stages: np.ndarray
    ) -> None:
        """Weighs and marks the tokens of the segments' spans; `starts` says where each segment's tokens begin."""
        for start, segment in zip(starts, segments, strict=False):
            if segment.spans:
                encoding = self._tokenizer.encode(segment.text, add_special_tokens=False)
                for span in segment.spans:
                    first, last = (start + place for place in _tokens_of(span, segment.text, encoding))
                    mask[first:last] *= np.float32(span.weight)
                    if span.stage:
                        stages[first:last] = span.stage

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. ASCII is in every Unicode normal form, so it is not normalized: a tenth is saved."""
        normalizer = self._tokenizer.normalizer
        if not isinstance(normalizer, _NORMAL_FORMS):
            return self._encoded(texts)
        others = iter(self._encoded([text for text in texts if not text.isascii()]))
        self._tokenizer.normalizer = None
        try:
            plain = iter(self._encoded([text for text in texts if text.isascii()]))
        finally:
            self._tokenizer.normalizer = normalizer
        return [next(plain if text.isascii() else others) for text in texts]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _check_control_tokens(self) -> None:
        wrong = [
            f"{mark} is {self._tokenizer.token_to_id(mark)}, not {number}"
            for mark, number in self.format.control_tokens.items()
            if self._tokenizer.token_to_id(mark) != number or self._ids([f"x{mark}x"])[0].count(number) != 1
        ]
        if wrong:
            raise UserError(
                f"{self.path} is not a tokenizer for {self.format.name}'s chat format ({'; '.join(wrong)}); "
                "use the tokenizer of the model that you tune; models of another format: docs/family.md"
            )

    def _check_boundaries(self) -> None:
        """Control tokens must cut the text whatever stands beside them."""
        for text in ("x", " x", "\n\nx", "1", "é", "'s", ". "):
            segments = self.format.render(
                [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": text, "reasoning_content": "x" + text},
                ],
                thinking=True,
            )
            (whole,) = self._ids([text_of(segments)])
            if self._encode_texts([segment.text for segment in segments])[0].tolist() != whole:
                raise UserError(
                    f"{self.path} encodes a chat turn differently in one piece and in parts (turn text {text!r}), "
                    "so the loss mask would be wrong; use the tokenizer of the model that you tune"
                )

    def _check_open_boundaries(
        self, documents: Sequence[Sequence[Segment]], places: Sequence[str] | None = None
    ) -> None:
        """The one boundary without a control token beside it is the white space behind a prompt's last mark, before
        the first character of a reasoning or an answer."""
        heads = {
            (left.text.rpartition(">")[2], right.text[:_HEAD]): number
            for number, segments in reversed(list(enumerate(documents)))
            for left, right in pairwise(segments)
            if left.text.endswith(_OPEN)
        }
        if not heads:
            return
        joined = self._ids([before + head for before, head in heads])
        first, alone = self._ids([before for before, _ in heads]), self._ids([head for _, head in heads])
        for ((before, head), number), together, left, right in zip(heads.items(), joined, first, alone, strict=True):
            if together != left + right:
                with _placed(places, number):
                    raise UserError(
                        f"{self.path} joins the newline after {_MARKS[before]} with the start of a text ({head!r}), "
                        "so the loss mask would be wrong; strip white space from 'reasoning_content' and 'content'"
                    )


@contextmanager
def _placed(places: Sequence[str] | None, number: int) -> Iterator[None]:
    """Says in an error which document it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{places[number]}: {error}" if places else str(error)) from error


def _tokens_of(span: Span, text: str, encoding: Encoding) -> tuple[int, int]:
    """First token of a span and the first behind it. Raises `UserError` when one of its ends is inside a token."""
    places = []
    for name, place in (("begins", span.start), ("ends", span.end)):
        cut = next(((start, end) for start, end in encoding.offsets if start < place < end), None)
        if cut:
            start, end = cut
            raise UserError(
                f"the span {text[span.start : span.end][:60]!r} {name} inside the token {text[start:end]!r} of this "
                f"tokenizer; let it {name.removesuffix('s')} before or behind that"
            )
        places.append(
            next((number for number, (start, _) in enumerate(encoding.offsets) if start >= place), len(encoding))
        )
    return places[0], places[1]
