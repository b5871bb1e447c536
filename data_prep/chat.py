"""Nemotron-3-Nano's chat format, as text that knows which of its characters the model itself writes.

`render` gives what the published chat template gives (`chat_template.jinja` here is our own writing of it, compared
with `render` in tests/data_prep/test_chat.py), cut into segments that carry the loss mask. The usual "assistant only"
mask of tokenizer libraries needs `{% generation %}` marks, which the published template lacks, and silently becomes
all ones.

What is supervised: exactly what the model writes at inference. A prompt ends in `<|im_start|>assistant\n<think>\n`
(thinking) or `<|im_start|>assistant\n<think></think>` (not), so these characters are prompt; the model writes the
rest of the turn up to and including `<|im_end|>`, not the newline after it. A turn that lost its reasoning because a
later user message follows reads as the model never wrote it, so it is context only: see `_render_turns`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from nano3.cli import UserError
from nano3.messages import AFTER_REASONING, CONTROL_TOKENS, Message

TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")
"""The same format as a Jinja template for `tokenizer_config.json`."""

PROMPT_THINKING = "<|im_start|>assistant\n<think>\n"
PROMPT_ANSWERING = "<|im_start|>assistant\n<think></think>"
TURN_END = "<|im_end|>"

PARTS = ("thinking", "tools")
"""Parts of an assistant turn that the loss can leave out: the reasoning, and the tool calls."""

_TOOLS_BEFORE = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
_TOOLS_AFTER = """
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell \
the user about function calls
</IMPORTANT>"""
"""What the published template says round the tool definitions, to the letter: the model was trained on these words."""


class Span(NamedTuple):
    """Characters `start` to `end` of a segment: `weight` multiplies its weight, `stage` (0 is none) marks them."""

    start: int
    end: int
    weight: float
    stage: int


class Segment(NamedTuple):
    """A run of text; `weight` is what the loss multiplies its tokens by: 0 for what the model did not write, else 1 or
    the `weight` of the assistant message. `spans` change that for some of its characters."""

    text: str
    weight: float
    spans: tuple[Span, ...] = ()

    @property
    def supervised(self) -> bool:
        """Whether the loss counts it."""
        return self.weight > 0


def render(
    messages: Sequence[Message],
    thinking: bool,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    no_loss: Collection[str] = (),
    trained_from: int = 0,
) -> list[Segment]:
    """The conversation in the model's format, neighbouring segments differing in `weight`.

    Joined, the segments are the whole text; there is no BOS token.

    Args:
        messages: as `nano3.messages.checked_messages` returns them.
        thinking: chooses between the two generation prompts and, as in the published template, changes nothing else:
            whether a turn shows its reasoning depends on the turn (use `without_reasoning` to train answers only).
        add_generation_prompt: whether the text ends where the model's turn begins.
        tools: their definitions, as `nano3.messages.checked_tools` returns them.
        no_loss: `PARTS` of the turns that are context only.
        trained_from: messages before this number are context only.

    Raises:
        UserError: a span that is not in what the model writes, or a tool definition that makes a control token.
    """
    pieces = [Segment(_system_block(messages, tools), 0)]
    pieces += _render_turns(messages, no_loss, trained_from)
    if add_generation_prompt:
        pieces.append(Segment(PROMPT_THINKING if thinking else PROMPT_ANSWERING, 0))
    return merged(pieces)


def text_of(segments: Sequence[Segment]) -> str:
    """The segments' whole text."""
    return "".join(segment.text for segment in segments)


def without_reasoning(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The same conversation with every `reasoning_content` taken out: what a client that never thinks would hold."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def split_turns(messages: Sequence[Message]) -> list[tuple[list[Message], int]]:
    """One document for each user message where an earlier turn is not shown as written, as (messages, `trained_from`).

    That is a turn with reasoning, or one that calls tools after words that begin with white space. In each document the
    turns since its user message are as the model wrote them, and the loss counts these alone, so that every turn is
    trained once. Any other conversation stays one document.
    """
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    earlier = [message for message in messages[: users[-1]] if message["role"] == "assistant"]
    if all(_assistant(message, past=True) == _assistant(message, past=False) for message in earlier):
        return [(list(messages), 0)]
    ends = [*users[1:], len(messages)]
    answered = [(start, end) for start, end in zip(users, ends, strict=True) if end > start + 1]
    return [(list(messages[:end]), start if start > users[0] else 0) for start, end in answered]


def is_empty(message: Message) -> bool:
    """Whether an assistant message says nothing: neither an answer nor a tool call, whatever it thought."""
    return not message["content"].strip() and not message.get("tool_calls")


def own_texts(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every text of a conversation that is not the format's own, as it is rendered."""
    yield from map(_tool_definition, tools)
    for message in messages:
        yield message["content"]
        yield message.get("reasoning_content", "")
        for call in message.get("tool_calls", ()):
            yield from (call["name"], *call["arguments"], *map(_parameter, call["arguments"].values()))


def _system_block(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tools:
        gap = "\n\n" if system else ""
        system += gap + _TOOLS_BEFORE + "".join(map(_tool_definition, tools)) + _TOOLS_AFTER
    return f"<|im_start|>system\n{system}<|im_end|>\n"


def _tool_definition(tool: Mapping[str, Any]) -> str:
    """One function as the published template describes it: known keys in a fixed order, all others after them."""
    parameters = tool.get("parameters", {})
    lines = ["", "<function>", f"<name>{tool['name']}</name>"]
    if "description" in tool:
        lines.append(f"<description>{str(tool['description']).strip()}</description>")
    lines.append("<parameters>")
    for name, schema in parameters.get("properties", {}).items():
        lines += ["<parameter>", f"<name>{name}</name>"]
        if "type" in schema:
            lines.append(f"<type>{schema['type']}</type>")
        if "description" in schema:
            lines.append(f"<description>{str(schema['description']).strip()}</description>")
        if "enum" in schema:
            lines.append(f"<enum>{json.dumps(schema['enum'], ensure_ascii=False)}</enum>")
        lines += _other_keys(schema, ("name", "type", "description", "enum"))
        lines.append("</parameter>")
    lines += _other_keys(parameters, ("type", "properties", "required"))
    if "required" in parameters:
        lines.append(f"<required>{json.dumps(parameters['required'], ensure_ascii=False)}</required>")
    lines.append("</parameters>")
    lines += [*_other_keys(tool, ("type", "name", "description", "parameters")), "</function>"]
    text = "\n".join(lines)
    made = next((mark for mark in CONTROL_TOKENS if mark in text), None)
    if made:  # a key of the schema becomes a tag of its name
        raise UserError(f"the definition of the tool {tool['name']!r} reads {made} when rendered; rename that key")
    return text


def _other_keys(values: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    return [f"<{key}>{_parameter(value)}</{key}>" for key, value in values.items() if key not in known]


def _render_turns(messages: Sequence[Message], no_loss: Collection[str], trained_from: int) -> list[Segment]:
    """All turns after the system block.

    An assistant turn before the last user message loses its reasoning. It is supervised only if nothing since the
    user message before it lost any: otherwise its text, or the context of its text, is not what the model saw and
    wrote. To train on such turns too, `split_turns` gives one document per user message. Nor is an empty turn
    supervised: it would teach to say nothing.
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
            trained = as_written and number >= trained_from and not is_empty(message)
            spans = spans_of(number, message, prompt == PROMPT_THINKING, written, no_loss) if trained else ()
            weight = float(message.get("weight", 1)) if trained else 0.0
            pieces += [Segment(prompt, 0), Segment(written, weight, spans), Segment("\n", 0)]
    return pieces


def _assistant(message: Message, past: bool) -> tuple[str, str]:
    """An assistant turn as (prompt, what the model wrote); `past` drops its reasoning as the template does."""
    answer = message["content"]
    calls = message.get("tool_calls", ())
    reasoning = message.get("reasoning_content")
    if reasoning and not past:
        prompt, written = PROMPT_THINKING, f"{reasoning}{AFTER_REASONING}{answer}"
    else:
        # The newline that stood between </think> and the answer survives the cut, except before tool calls.
        prompt, written = PROMPT_ANSWERING, "\n" + answer if reasoning else answer
    written = written.strip() if past and calls else written.rstrip()
    if calls:
        written += "\n" + "".join(map(_tool_call, calls))
    return prompt, written + TURN_END


def spans_of(number: int, message: Message, thinks: bool, written: str, no_loss: Collection[str]) -> tuple[Span, ...]:
    """The spans of a turn in what the model wrote: the message's own, in order, then the parts without loss.

    `number` is the message's, and `thinks` says whether `written` holds its reasoning. Raises `UserError` for a span
    that is not in it, and for two that overlap.
    """
    if not message.get("spans") and not no_loss:
        return ()
    given = enumerate(message.get("spans", ()))
    spans = sorted(_located(f"messages[{number}].spans[{place}]", span, written) for place, span in given)
    for left, right in pairwise(spans):
        if right.start < left.end:
            overlap = written[right.start : left.end]
            raise UserError(f"messages[{number}]: two spans overlap at {overlap[:40]!r}; cut one of them")
    if "thinking" in no_loss and thinks:
        spans.append(Span(0, written.index("</think>") + len("</think>"), 0, 0))
    if "tools" in no_loss and message.get("tool_calls"):
        start = written.index("<tool_call>")
        # The newline before the first call may share a token with an answer, and stands alone where there is none.
        spans.append(Span(start if message["content"].strip() else start - 1, len(written), 0, 0))
    return tuple(spans)


def _located(where: str, span: Mapping[str, Any], written: str) -> Span:
    """A span of a message as characters of `written`, which ends in `TURN_END`."""
    own = written.removesuffix(TURN_END)
    if "text" in span:
        start, times = own.find(span["text"]), own.count(span["text"])
        if times != 1:
            raise UserError(
                f"{where}: {span['text'][:60]!r} stands {times} times in what the model writes; give 'start' and 'end'"
                if times
                else f"{where}: {span['text'][:60]!r} is not in what the model writes ({own[:60]!r}...)"
            )
        end = start + len(span["text"])
    else:
        start, end = span["start"], span["end"]
        if not start < end <= len(own):
            raise UserError(
                f"{where}: characters {start} to {end} of the {len(own)} that the model writes; "
                "they count from 0, and 'end' is the first that is not in it"
            )
    return Span(start, end, float(span.get("weight", 1)), span.get("stage", 0))


def _tool_call(function: Message) -> str:
    parameters = "".join(
        f"<parameter={name}>\n{_parameter(value)}\n</parameter>\n" for name, value in function["arguments"].items()
    )
    return f"<tool_call>\n<function={function['name']}>\n{parameters}</function>\n</tool_call>\n"


def _parameter(value: Any) -> str:
    """Lists and objects as JSON, everything else as Python prints it (`True`, `None`): the template's own rule."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | Mapping) else str(value)


def merged(pieces: Sequence[Segment]) -> list[Segment]:
    """Joins neighbours of equal kind, so that a tokenizer meets as few boundaries as possible."""
    merged: list[Segment] = []
    for piece in pieces:
        if merged and merged[-1].weight == piece.weight and not merged[-1].spans and not piece.spans:
            merged[-1] = Segment(merged[-1].text + piece.text, piece.weight)
        elif piece.text:
            merged.append(piece)
    return merged
