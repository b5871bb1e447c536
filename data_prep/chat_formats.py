"""The chat formats that are known here, and which of them a tokenizer is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import chat, qwen3
from nano3.messages import CONTROL_TOKENS, TURN_ENDS, Message


class ChatFormat(NamedTuple):
    """How conversations of one model family become text."""

    name: str
    control_tokens: Mapping[str, int]
    template: Path
    """The format as a Jinja template, of our own writing."""
    render: Callable[..., list[chat.Segment]]
    """As `data_prep.chat.render`."""
    split_turns: Callable[[Sequence[Message]], list[tuple[list[Message], int]]]
    """As `data_prep.chat.split_turns`."""
    stop_ids: tuple[int, ...]
    """Tokens that end the model's turn."""


NEMOTRON = ChatFormat("Nemotron-3-Nano", CONTROL_TOKENS, chat.TEMPLATE_FILE, chat.render, chat.split_turns, TURN_ENDS)
QWEN3 = ChatFormat(
    "Qwen3", qwen3.CONTROL_TOKENS, qwen3.TEMPLATE_FILE, qwen3.render, qwen3.split_turns, (151643, 151645)
)


def format_of(tokenizer: Any) -> ChatFormat:
    """The format whose turns this tokenizer (of the library `tokenizers`) marks; Nemotron's where it marks none."""
    mark = "<|im_start|>"
    return QWEN3 if tokenizer.token_to_id(mark) == QWEN3.control_tokens[mark] else NEMOTRON
