"""Nemotron-3-Nano's chat format, as text that knows which of its characters the model itself writes.

`render` gives what the published chat template gives (`chat_template.jinja` here is our own writing of it, compared
with `render` in tests/data_prep/test_chat.py), cut into segments that carry the loss mask. The usual "assistant only"
mask of tokenizer libraries needs `{% generation %}` marks, which the published template lacks. It silently
becomes all ones.

What is supervised: exactly what the model writes at inference. A prompt ends in `<|im_start|>assistant\n<think>\n`
(thinking) or `<|im_start|>assistant\n<think></think>` (not), so these characters are prompt; the model writes the
rest of the turn up to and including `<|im_end|>`, not the newline after it. A turn that lost its reasoning because a
later user message follows reads as the model never wrote it, so it is context only: see `_render_turns`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nano3.cli import UserError

SPECIAL_IDS = {
    "<s>": 1,
    "</s>": 2,
    "<|im_start|>": 10,
    "<|im_end|>": 11,
    "<think>": 12,
    "</think>": 13,
    "<tool_call>": 14,
    "</tool_call>": 15,
}
"""Ids of the tokens that the format is made of, in Nemotron-3-Nano's tokenizer and in pico's."""

TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")
"""The same format as a Jinja template for `tokenizer_config.json`."""

PROMPT_THINKING = "<|im_start|>assistant\n<think>\n"
PROMPT_ANSWERING = "<|im_start|>assistant\n<think></think>"
TURN_END = "<|im_end|>"

LARGEST_WEIGHT = 1e6
"""Of the loss; larger ones are mistakes, and squared they would leave FP32."""

Message = Mapping[str, Any]

_TURN_MARKS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
_MESSAGE_KEYS = {
    "system": {"content"},
    "user": {"content"},
    "assistant": {"content", "reasoning_content", "tool_calls", "weight"},
    "tool": {"content", "name", "tool_call_id"},
}


class Segment(NamedTuple):
    """A run of text; `weight` is what the loss multiplies its tokens by: 0 for what the model did not write, else 1 or
    the `weight` of the assistant message."""

    text: str
    weight: float

    @property
    def supervised(self) -> bool:
        """Whether the loss counts it."""
        return self.weight > 0


def render(messages: Sequence[Message], thinking: bool, add_generation_prompt: bool = False) -> list[Segment]:
    """The conversation in the model's format, neighbouring segments differing in `weight`.

    `thinking` chooses between the two generation prompts and, as in the published template, changes nothing else:
    whether a turn shows its reasoning depends on the turn (use `without_reasoning` to train answers only).
    Joined, the segments are the whole text; there is no BOS token. Raises `UserError` for a malformed conversation.
    """
    check_messages(messages)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    pieces = [Segment(f"<|im_start|>system\n{system}<|im_end|>\n", 0)]
    pieces += _render_turns(messages)
    if add_generation_prompt:
        pieces.append(Segment(PROMPT_THINKING if thinking else PROMPT_ANSWERING, 0))
    return _merged(pieces)


def text_of(segments: Sequence[Segment]) -> str:
    """The segments' whole text."""
    return "".join(segment.text for segment in segments)


def without_reasoning(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The same conversation with every `reasoning_content` taken out: what a client that never thinks would hold."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def check_messages(messages: Sequence[Message]) -> None:
    """Raises `UserError`, naming the message by number from 0, where the conversation cannot be rendered faithfully."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("'messages' must be a list of at least one message")
    previous = None
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{number}] must be an object with 'role' and 'content'")
        role = message.get("role")
        if role not in _MESSAGE_KEYS:
            raise UserError(f"messages[{number}]: role {role!r} is not one of {', '.join(_MESSAGE_KEYS)}")
        unknown = sorted(key for key in message if key not in _MESSAGE_KEYS[role] | {"role"} and message[key])
        if unknown:
            raise UserError(
                f"messages[{number}]: a {role} message cannot have {', '.join(map(repr, unknown))}; "
                "remove it or put its text into 'content'"
            )
        if role == "system" and number:
            raise UserError(f"messages[{number}]: a system message can only be the first; merge it into that one")
        if role == "tool" and previous not in ("assistant", "tool"):
            raise UserError(f"messages[{number}]: a tool message must follow an assistant message that calls it")
        _check_texts(number, message)
        if "weight" in message:
            check_weight(f"messages[{number}]", message["weight"])
        previous = role
    if all(message["role"] != "user" for message in messages):
        raise UserError("'messages' has no user message; a conversation needs one")


def check_weight(where: str, weight: object) -> None:
    """Refuses a weight of the loss that is not a number from 0 to `LARGEST_WEIGHT`."""
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= LARGEST_WEIGHT:
        raise UserError(
            f"{where}: 'weight' is {weight!r}; give a number from 0 to {LARGEST_WEIGHT:g} (without one it is 1)"
        )


def _check_texts(number: int, message: Message) -> None:
    """Refuses texts that are not strings or that would be read as turn marks by the tokenizer."""
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        content = ""
    reasoning = message.get("reasoning_content") or ""
    for key, text in (("content", content), ("reasoning_content", reasoning)):
        if not isinstance(text, str):
            raise UserError(f"messages[{number}]: {key!r} must be a string, not {type(text).__name__}")
        for mark in _TURN_MARKS:
            if mark in text:
                raise UserError(
                    f"messages[{number}]: {key!r} contains {mark}, which the tokenizer reads as a control token; "
                    "remove it or write it differently"
                )
        if message["role"] == "assistant" and ("<think>" in text or "</think>" in text):
            raise UserError(
                f"messages[{number}]: {key!r} contains a think mark; "
                "give the reasoning as 'reasoning_content' and the answer alone as 'content'"
            )
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"messages[{number}]: every tool call needs a function name")
        if not isinstance(function.get("arguments", {}), Mapping):
            raise UserError(
                f"messages[{number}]: arguments of {function['name']!r} must be an object; decode the JSON string"
            )


def _render_turns(messages: Sequence[Message]) -> list[Segment]:
    """All turns after the system block.

    An assistant turn before the last user message loses its reasoning. It is supervised only if nothing since the
    user message before it lost any: otherwise its text, or the context of its text, is not what the model saw and
    wrote. To train on such turns too, give one conversation per user message.
    """
    last_user = max(number for number, message in enumerate(messages) if message["role"] == "user")
    pieces: list[Segment] = []
    as_written = True
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "user":
            as_written = True
            pieces.append(Segment(f"<|im_start|>user\n{message['content']}<|im_end|>\n", 0))
        elif role == "tool":
            following = messages[number + 1]["role"] if number + 1 < len(messages) else None
            opening = "" if messages[number - 1]["role"] == "tool" else "<|im_start|>user\n"
            closing = "" if following == "tool" else "<|im_end|>\n"
            response = f"<tool_response>\n{message['content']}\n</tool_response>\n"
            pieces.append(Segment(opening + response + closing, 0))
        elif role == "assistant":
            prompt, written = _assistant(message, past=False)
            if number < last_user:
                shown = _assistant(message, past=True)
                as_written = as_written and shown == (prompt, written)
                prompt, written = shown
            weight = float(message.get("weight", 1)) if as_written else 0.0
            pieces += [Segment(prompt, 0), Segment(written, weight), Segment("\n", 0)]
    return pieces


def _assistant(message: Message, past: bool) -> tuple[str, str]:
    """An assistant turn as (prompt, what the model wrote); `past` drops its reasoning as the template does."""
    answer = message.get("content") or ""
    calls = message.get("tool_calls") or ()
    reasoning = message.get("reasoning_content") or ""
    if reasoning.strip() and not past:
        prompt, written = PROMPT_THINKING, f"{reasoning}\n</think>\n{answer}"
    else:
        # The newline that stood between </think> and the answer survives the cut, except before tool calls.
        prompt, written = PROMPT_ANSWERING, "\n" + answer if reasoning.strip() else answer
    written = written.strip() if past and calls else written.rstrip()
    if calls:
        written += "\n" + "".join(_tool_call(call.get("function", call)) for call in calls)
    return prompt, written + TURN_END


def _tool_call(function: Message) -> str:
    parameters = "".join(
        f"<parameter={name}>\n{_parameter(value)}\n</parameter>\n"
        for name, value in function.get("arguments", {}).items()
    )
    return f"<tool_call>\n<function={function['name']}>\n{parameters}</function>\n</tool_call>\n"


def _parameter(value: Any) -> str:
    """Lists and objects as JSON, everything else as Python prints it (`True`, `None`): the template's own rule."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple, Mapping)) else str(value)


def _merged(pieces: Sequence[Segment]) -> list[Segment]:
    """Joins neighbours of equal kind, so that a tokenizer meets as few boundaries as possible."""
    merged: list[Segment] = []
    for text, weight in pieces:
        if merged and merged[-1].weight == weight:
            merged[-1] = Segment(merged[-1].text + text, weight)
        elif text:
            merged.append(Segment(text, weight))
    return merged
