"""A byte-level tokenizer with the model's control tokens at their real ids, and small chat files."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nano3.messages import CONTROL_TOKENS

FIRST_BYTE = 16
"""Id of byte 0: byte b has id 16 + b, so that tests can compute tokens by hand."""


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte, in byte order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def write_tokenizer(
    folder: Path, special_ids: dict[str, int] = CONTROL_TOKENS, merges: list[tuple[str, str]] | None = None
) -> Path:
    """Writes `tokenizer.json` into `folder`; `merges` are pairs of byte-level characters that become one token."""
    vocab = {f"<reserved{number}>": number for number in range(FIRST_BYTE)}
    vocab = {token: number for token, number in vocab.items() if number not in special_ids.values()}
    vocab |= special_ids
    vocab |= {character: FIRST_BYTE + byte for byte, character in enumerate(byte_characters())}
    for pair in merges or []:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in special_ids])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def ids(text: str) -> list[int]:
    """Token ids of text without control tokens."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def row(question: str, answer: str, reasoning: str | None = None, source: str = "test") -> dict:
    """One question with its answer as a row of chat JSONL."""
    reply = {"role": "assistant", "content": answer}
    if reasoning is not None:
        reply["reasoning_content"] = reasoning
    return {"id": question, "source": source, "messages": [{"role": "user", "content": question}, reply]}


def write_jsonl(path: Path, rows: list) -> Path:
    """Writes rows, or raw lines where they are text, one a line."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path
