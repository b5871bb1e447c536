"""Conversations: the rows of chat data, read in one way for training and for evaluation.

One row is `{"id": ..., "source": ..., "weight": ..., "tools": [...], "messages": [...]}`; only `messages` is required.
For evaluation the question of a row is everything but its last message.

A key that could change the prompt or the loss is understood or refused by name, on the row and on every message; the
row's other keys travel along in `fields`. No text may hold a control token: inside a tool's arguments, too, the
tokenizer would read it as a real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nano3.cli import UserError
from nano3.row_keys import FACTS, is_harmless
from nano3.rows import Rows, open_rows

CONTROL_TOKENS = {
    "<s>": 1,
    "</s>": 2,
    "<|im_start|>": 10,
    "<|im_end|>": 11,
    "<think>": 12,
    "</think>": 13,
    "<tool_call>": 14,
    "</tool_call>": 15,
}
"""The tokens that the chat format is made of, with their ids in Nemotron-3-Nano's tokenizer and in pico's."""
TURN_ENDS = (CONTROL_TOKENS["</s>"], CONTROL_TOKENS["<|im_end|>"])
"""Those that end the model's turn."""

AFTER_REASONING = "\n</think>\n"
"""What the format puts between the reasoning of a turn and its answer."""

LARGEST_WEIGHT = 1e6
"""Of the loss; larger ones are mistakes, and squared they would leave FP32."""
LARGEST_STAGE = 255
"""Stages of spans are bytes in the token store; 0 is no stage."""

Message = Mapping[str, Any]

_EACH = {"role", "content", "weight", "loss"}
_MESSAGE_KEYS = {
    "system": _EACH,
    "user": _EACH,
    "assistant": _EACH | {"reasoning_content", "tool_calls", "spans"},
    "tool": _EACH | {"name", "tool_call_id"},
}
"""What a message of each role may have."""
_INSTEAD = {
    **dict.fromkeys(("train", "training", "trainable", "mask", "masked", "loss_mask"), "say 'loss': true or false"),
    **dict.fromkeys(("prefix", "prefill"), "nothing in the template begins an answer; remove it"),
    "refusal": "if the model should say this, make it the 'content'",
}
"""What to do with a key of a message that others understand."""
_UNDERSTOOD = {"messages", "id", "source", "weight", "tools", "functions", "system"}
_REFUSED = {
    "chat_template": "the template is the tokenizer folder's",
    "chat_template_kwargs": "leave out reasoning_content for a turn that does not think, and remove the key",
    "developer": "put its text into a system message",
    "documents": "put their text into a message",
    "function_call": "no call can be forced: the template has no words for it",
    "instruction": "convert the rows with data_prep/convert.py",
    "instructions": "put their text into a system message",
    "labels": "give 'weight' or 'loss' on the assistant messages, or 'spans'",
    "loss": "give it on the assistant messages, or 'weight' on the row",
    "loss_mask": "give 'weight' or 'loss' on the assistant messages, or 'spans'",
    "loss_weight": "the row's weight is called 'weight'",
    "mask": "give 'weight' or 'loss' on the assistant messages, or 'spans'",
    "parallel_tool_calls": "the template has no words for it",
    "prefix": "put its text into a message",
    "reasoning_content": "it belongs to an assistant message",
    "reasoning_effort": "the template has no words for it",
    "response_format": "the template has no words for it; describe the form in a message",
    "sample_weight": "the row's weight is called 'weight'",
    "spans": "they belong to an assistant message",
    "suffix": "put its text into a message",
    "system_prompt": "call it 'system', or make it the first message",
    "thinking": "give reasoning_content on the assistant messages",
    "tool_choice": "no call can be forced: the template has no words for it",
    "train": "give 'weight' or 'loss' on the assistant messages",
    "weights": "the row's weight is called 'weight'",
}
"""Keys of a row that would change the prompt or the loss, and what to do instead."""
_OBJECT, _LIST = (dict, Mapping), (list, Sequence)
"""What JSON and Arrow give; Python looks for the plain classes first, which are ten times as fast to find."""
_ON_OFF = {"reasoning": "on or off, as some data sets note; reasoning itself belongs to an assistant message"}
_PLAIN_KEYS = (_UNDERSTOOD | {*FACTS}) - {*_REFUSED, *_ON_OFF, "tools", "functions"}
"""Most rows have no other, and nothing to be checked in them."""


@dataclass(frozen=True)
class Conversation:
    """One row. `messages` and `tools` are as `checked_messages` and `checked_tools` return them, `where` is `file:line`
    for messages to the user, `weight` its share in the loss, `fields` what else the row says."""

    id: str
    source: str
    messages: list[dict[str, Any]]
    where: str
    weight: float = 1.0
    tools: list[dict[str, Any]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The user's words, without the system prompt and the answers."""
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")


def conversation(row: Mapping[str, Any], where: str, source: str) -> Conversation:
    """A row as a `Conversation`.

    Args:
        row: its keys, as JSON or Arrow give them; a key with null is a key that is not given.
        where: `file:line`, for messages, and the `id` of a row that has none.
        source: of a row that names none.

    Raises:
        UserError: with `where`, for a row that cannot be used as it is.
    """
    row = {key: value for key, value in row.items() if value is not None}
    try:
        if "messages" not in row:
            raise UserError(f"no 'messages'; the row has {', '.join(map(repr, row)) or 'nothing'}{_other_form(row)}")
        _check_row_keys(row)
        messages = checked_messages(_with_system(row))
        tools = checked_tools(row.get("tools") or row.get("functions") or [])
        _check_weight("this row", row.get("weight", 1))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    fields = {key: value for key, value in row.items() if key not in _UNDERSTOOD}
    name = str(row.get("source", source))
    return Conversation(str(row.get("id", where)), name, messages, where, float(row.get("weight", 1)), tools, fields)


def _other_form(row: Mapping[str, Any]) -> str:
    """What the row looks like instead, and the remedy."""
    forms = {
        "conversations": "ShareGPT",
        "instruction": "Alpaca",
        "chosen": "a preference pair",
        "prompt": "prompt and completion",
        "question": "question and answer",
    }
    found = next((form for key, form in forms.items() if key in row), None)
    convert = "convert it with data_prep/convert.py"
    return f": this is the form of {found}; {convert}" if found else f"; {convert} --map"


def _check_row_keys(row: Mapping[str, Any]) -> None:
    if row.keys() <= _PLAIN_KEYS:
        return
    for key, value in row.items():
        if key in _REFUSED and value not in ("", [], {}):
            raise UserError(
                f"{key!r} would change the prompt or the loss and is not understood on a row: {_REFUSED[key]}"
            )
    for key, meaning in _ON_OFF.items():
        if str(row.get(key, "on")).lower() not in ("on", "off", "true", "false", ""):
            raise UserError(f"{key!r} is {_short(row[key])}; on a row it may say {meaning}")
    for key, value in row.items():
        if key not in _UNDERSTOOD and key not in FACTS and not is_harmless(key, value, row["messages"]):
            raise UserError(
                f"{key!r} may change the prompt or the loss and is not understood on a row; put it into a message, or "
                "leave it out with data_prep/convert.py --ignore"
            )
    if row.get("tools") and row.get("functions"):
        raise UserError("'tools' and 'functions' are both given; they are two names of one thing: keep 'tools'")


def _with_system(row: Mapping[str, Any]) -> Any:
    """The row's messages, headed by its `system` prompt where it has one."""
    messages, system = row["messages"], row.get("system", "")
    if not isinstance(system, str):
        raise UserError(f"'system' is {_short(system)}; it must be text")
    if not system or not isinstance(messages, list):
        return messages
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        raise UserError("'system' and a system message are both given; keep one")
    return [{"role": "system", "content": system}, *messages]


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """The messages with everything that means "not given" left out: null, empty, or without a meaning for the role.

    Calls are `{"name": ..., "arguments": {...}}`, whether they came in OpenAI's form (wrapped in `function`, arguments
    as a JSON string) or plain. `"loss": false` has become `"weight": 0`. White space around `reasoning_content` is
    taken off: the format puts its own newlines there, and a tokenizer might join the two.

    Raises:
        UserError: names the message by its number from 0.
    """
    if not isinstance(messages, _LIST) or isinstance(messages, str) or not messages:
        raise UserError("'messages' must be a list of at least one message")
    checked: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        try:
            checked.append(_checked_message(message, checked))
        except UserError as error:
            raise UserError(f"messages[{number}]: {error}") from error
    if all(message["role"] != "user" for message in checked):
        raise UserError("'messages' has no user message; a conversation needs one")
    return checked


def _checked_message(message: object, before: Sequence[Message]) -> dict[str, Any]:
    if not isinstance(message, _OBJECT):
        raise UserError(f"{_short(message)} is no message; it must be an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str) or role not in _MESSAGE_KEYS:
        hint = "; give the text as a system message" if role == "developer" else ""
        raise UserError(f"role {_short(role)} is not one of {', '.join(_MESSAGE_KEYS)}{hint}")
    given = {key: value for key, value in message.items() if value is not None and value not in ("", [], {})}
    if unknown := sorted(given.keys() - _MESSAGE_KEYS[role]):
        remedy = _INSTEAD.get(unknown[0], "remove it or put its text into 'content'")
        raise UserError(f"a message of role {role} cannot have {', '.join(map(repr, unknown))}; {remedy}")
    if role == "system" and before:
        raise UserError("a system message can only be the first; merge it into that one")
    if role == "tool" and (not before or before[-1]["role"] not in ("assistant", "tool")):
        raise UserError("a tool message must follow an assistant message that calls it")
    if role != "assistant" and message.get("content") is None:
        raise UserError("'content' is missing; it must be text")
    checked: dict[str, Any] = {"role": role, "content": _text("'content'", message.get("content") or "")}
    if given.keys() <= {"role", "content"}:  # most messages say no more
        return checked
    checked |= _checked_loss(role, given)
    return checked | _checked_assistant(given) if role == "assistant" else checked


def _checked_loss(role: str, given: Message) -> dict[str, float]:
    """`{"weight": w}` from `weight` and `loss`, empty where neither says anything."""
    if "loss" not in given and "weight" not in given:
        return {}
    loss, weight = given.get("loss", True), given.get("weight", 1)
    if not isinstance(loss, bool):
        raise UserError(f"'loss' is {_short(loss)}; it must be true or false")
    _check_weight(f"this {role} message", weight)
    if role != "assistant":
        if (weight and "weight" in given) or (loss and "loss" in given):
            raise UserError(f"the loss counts what the model writes, and no {role} message; remove 'weight' or 'loss'")
        return {}
    if "loss" in given and "weight" in given and loss != bool(weight):
        raise UserError(f"'loss' is {str(loss).lower()} but 'weight' is {weight}; keep one of them")
    return {"weight": float(weight) if loss else 0.0} if "weight" in given or not loss else {}


def _checked_assistant(given: Message) -> dict[str, Any]:
    """Reasoning, calls and spans of an assistant message, as far as it has them."""
    checked: dict[str, Any] = {}
    reasoning = given.get("reasoning_content", "")
    if _text("'reasoning_content'", reasoning).strip():
        checked["reasoning_content"] = reasoning.strip()
    calls = given.get("tool_calls", [])
    if not isinstance(calls, _LIST) or isinstance(calls, str):
        raise UserError(f"'tool_calls' is {_short(calls)}; it must be a list of calls")
    if calls:
        checked["tool_calls"] = [_checked_call(call) for call in calls]
    spans = given.get("spans", [])
    if not isinstance(spans, _LIST) or isinstance(spans, str):
        raise UserError(f"'spans' is {_short(spans)}; it must be a list")
    if spans:
        checked["spans"] = [_checked_span(number, span) for number, span in enumerate(spans)]
        if reasoning[:1].isspace() and any("start" in span for span in checked["spans"]):
            raise UserError(
                "'spans' counts characters, but 'reasoning_content' begins with white space, which is left out"
            )
    return checked


def _checked_call(call: object) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise UserError("every tool call needs a function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _decoded(name, arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"arguments of {name!r} must be an object, or one as a JSON string, not {_short(arguments)}")
    _text("the name of a tool call", name)
    for key, value in arguments.items():
        _text(f"tool call {name!r}: a parameter's name", key)
        _text(
            f"tool call {name!r}: {key!r}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
    return {"name": name, "arguments": dict(arguments)}


def _decoded(name: str, arguments: str) -> Any:
    """OpenAI's form: the arguments as the text of a JSON object."""
    if not arguments.strip():
        return {}
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise UserError(f"arguments of {name!r} are not valid JSON ({error})") from error


def _checked_span(number: int, span: object) -> dict[str, Any]:
    """A span as `{"text": ...}` or `{"start": ..., "end": ...}`, with `weight` and `stage` where they are given."""
    if not isinstance(span, Mapping):
        raise UserError(f"spans[{number}] is {_short(span)}; it must be an object")
    given = {key: value for key, value in span.items() if value is not None}
    unknown = sorted(set(given) - {"text", "start", "end", "weight", "stage"})
    if unknown:
        raise UserError(f"spans[{number}] has {unknown[0]!r}; a span has text, or start and end, and weight and stage")
    if ("text" in given) == ("start" in given) or ("start" in given) != ("end" in given):
        raise UserError(f"spans[{number}] needs either 'text' or 'start' and 'end'")
    if "text" in given and (not isinstance(given["text"], str) or not given["text"]):
        raise UserError(f"spans[{number}]: 'text' is {_short(given['text'])}; it must be text")
    for key in {"start", "end"} & set(given):
        if not isinstance(given[key], int) or isinstance(given[key], bool) or given[key] < 0:
            raise UserError(f"spans[{number}]: {key!r} is {_short(given[key])}; it must be a number of characters")
    if "weight" not in given and "stage" not in given:
        raise UserError(f"spans[{number}] has neither 'weight' nor 'stage', so it changes nothing; remove it")
    _check_weight(f"spans[{number}]", given.get("weight", 1))
    stage = given.get("stage", 1)
    if not isinstance(stage, int) or isinstance(stage, bool) or not 1 <= stage <= LARGEST_STAGE:
        raise UserError(f"spans[{number}]: 'stage' is {_short(stage)}; give a whole number from 1 to {LARGEST_STAGE}")
    return given


def checked_tools(tools: object) -> list[dict[str, Any]]:
    """Tool definitions, each without the wrapper of OpenAI's form: `{"name": ..., "description": ..., "parameters":
    {...}}`.

    Nulls are left out, and with them the parameters of other tools that Arrow adds to each; the null of a `default` or
    `const` stays, since it is a value.

    Raises:
        UserError: names the tool by its number from 0.
    """
    if not isinstance(tools, _LIST) or isinstance(tools, str):
        raise UserError(f"'tools' is {_short(tools)}; it must be a list of tool definitions")
    return [_checked_tool(f"tools[{number}]", tool) for number, tool in enumerate(tools)]


def _checked_tool(where: str, tool: object) -> dict[str, Any]:
    inner = tool.get("function") or tool if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise UserError(f"{where} is no tool definition; give an object with 'name', 'description' and 'parameters'")
    definition = without_nulls(inner)
    parameters = definition.get("parameters")
    if parameters is not None and (
        not isinstance(parameters, Mapping) or not ("type" in parameters or "properties" in parameters)
    ):
        raise UserError(
            f"{where} ({inner['name']}): 'parameters' is {_short(parameters)}; give a JSON schema such as "
            '{"type": "object", "properties": {}}, or leave it out for a function without parameters'
        )
    properties = (parameters or {}).get("properties", {})
    if not isinstance(properties, Mapping) or not all(isinstance(value, Mapping) for value in properties.values()):
        raise UserError(f"{where} ({inner['name']}): 'properties' must be an object with a schema for each parameter")
    _text(f"{where} ({inner['name']})", json.dumps(definition, ensure_ascii=False))
    return definition


def without_nulls(value: Any) -> Any:
    """A JSON schema without keys whose value is null; the values that it gives, such as a default, stay as they are."""
    if isinstance(value, Mapping):
        return {
            key: inner if key in ("default", "const", "enum", "examples") else without_nulls(inner)
            for key, inner in value.items()
            if inner is not None or key in ("default", "const")
        }
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_weight(where: str, weight: object) -> None:
    """Refuses a weight of the loss that is not a number from 0 to `LARGEST_WEIGHT`."""
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= LARGEST_WEIGHT:
        raise UserError(
            f"{where}: 'weight' is {_short(weight)}; give a number from 0 to {LARGEST_WEIGHT:g} (without one it is 1)"
        )


def _text(key: str, text: object) -> str:
    """Text that the tokenizer can encode and that has no control token in it."""
    if not isinstance(text, str):
        raise UserError(f"{key} must be a string, not {type(text).__name__}")
    if "<" in text:
        for mark in CONTROL_TOKENS:
            if mark in text:
                raise UserError(_about(key, mark))
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise UserError(f"{key} holds {half}, half of a character (a lone surrogate); write it whole") from None
    return text


def _about(key: str, mark: str) -> str:
    remedy = {
        "<think>": "give the reasoning as 'reasoning_content' and the answer alone as 'content'",
        "<tool_call>": "give the calls as 'tool_calls'",
    }.get(mark.replace("/", ""), "remove it or write it differently")
    kind = "a think mark" if "think" in mark else f"{mark}"
    return f"{key} contains {kind}, which the tokenizer reads as a control token; {remedy}"


def _short(value: object) -> str:
    """A value in at most 60 characters of one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Conversations:
    """The conversations of an input, read once and row by row in constant memory.

    `source` is anything that `nano3.rows.open_rows` takes, or rows that are open. Iterating raises `UserError`, with
    file and row, for a row that cannot be used.
    """

    def __init__(self, source: Path | str | Rows) -> None:
        self.rows = source if isinstance(source, Rows) else open_rows(source)

    def __iter__(self) -> Iterator[Conversation]:
        for row in self.rows:
            yield conversation(row.fields, row.where, self.rows.name)

    @property
    def name(self) -> str:
        """The input's name without its ending."""
        return self.rows.name

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What was read, once all of it was: names and SHA-256 of files, the commit of a hub data set."""
        return self.rows.facts
