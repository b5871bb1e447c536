"""Messages and tools of a conversation: what each may say, in one form for training and for evaluation.

A key that could change the prompt or the loss is understood or refused by name. No text may hold a control token:
inside a tool's arguments, too, the tokenizer would read it as a real one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nano3.documents import shown
from nano3.errors import UserError

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
_OBJECT, _LIST = (dict, Mapping), (list, Sequence)
"""What JSON and Arrow give; Python looks for the plain classes first, which are ten times as fast to find."""


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
        raise UserError(f"{shown(message)} is no message; it must be an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str) or role not in _MESSAGE_KEYS:
        hint = "; give the text as a system message" if role == "developer" else ""
        raise UserError(f"role {shown(role)} is not one of {', '.join(_MESSAGE_KEYS)}{hint}")
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
        raise UserError(f"'loss' is {shown(loss)}; it must be true or false")
    check_weight(f"this {role} message", weight)
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
        raise UserError(f"'tool_calls' is {shown(calls)}; it must be a list of calls")
    if calls:
        checked["tool_calls"] = [_checked_call(call) for call in calls]
    spans = given.get("spans", [])
    if not isinstance(spans, _LIST) or isinstance(spans, str):
        raise UserError(f"'spans' is {shown(spans)}; it must be a list")
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
        raise UserError(f"arguments of {name!r} must be an object, or one as a JSON string, not {shown(arguments)}")
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
        raise UserError(f"spans[{number}] is {shown(span)}; it must be an object")
    given = {key: value for key, value in span.items() if value is not None}
    unknown = sorted(set(given) - {"text", "start", "end", "weight", "stage"})
    if unknown:
        raise UserError(f"spans[{number}] has {unknown[0]!r}; a span has text, or start and end, and weight and stage")
    if ("text" in given) == ("start" in given) or ("start" in given) != ("end" in given):
        raise UserError(f"spans[{number}] needs either 'text' or 'start' and 'end'")
    if "text" in given and (not isinstance(given["text"], str) or not given["text"]):
        raise UserError(f"spans[{number}]: 'text' is {shown(given['text'])}; it must be text")
    for key in {"start", "end"} & set(given):
        if not isinstance(given[key], int) or isinstance(given[key], bool) or given[key] < 0:
            raise UserError(f"spans[{number}]: {key!r} is {shown(given[key])}; it must be a number of characters")
    if "weight" not in given and "stage" not in given:
        raise UserError(f"spans[{number}] has neither 'weight' nor 'stage', so it changes nothing; remove it")
    check_weight(f"spans[{number}]", given.get("weight", 1))
    stage = given.get("stage", 1)
    if not isinstance(stage, int) or isinstance(stage, bool) or not 1 <= stage <= LARGEST_STAGE:
        raise UserError(f"spans[{number}]: 'stage' is {shown(stage)}; give a whole number from 1 to {LARGEST_STAGE}")
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
        raise UserError(f"'tools' is {shown(tools)}; it must be a list of tool definitions")
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
            f"{where} ({inner['name']}): 'parameters' is {shown(parameters)}; give a JSON schema such as "
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


def check_weight(where: str, weight: object) -> None:
    """Refuses a weight of the loss that is not a number from 0 to `LARGEST_WEIGHT`."""
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= LARGEST_WEIGHT:
        raise UserError(
            f"{where}: 'weight' is {shown(weight)}; give a number from 0 to {LARGEST_WEIGHT:g} (without one it is 1)"
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
