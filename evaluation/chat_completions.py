"""OpenAI's chat completions: how a conversation is sent, and what counts as a whole answer.

An answer counts only when it is one JSON document with one choice that says how it ended. `evaluation/server.py` asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired

from typing_extensions import TypedDict

from nano3.cli import UserError
from nano3.documents import Count, Finite, Name, parse_json

LIKELIEST = 20
"""Tokens whose log-probabilities are asked for: the most that OpenAI's interface gives."""


class _Function(TypedDict):
    name: Name
    arguments: str


class _Call(TypedDict):
    function: _Function


class _Message(TypedDict):
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[_Call] | None]


class _Likely(TypedDict):
    token: str
    logprob: Finite


class _Place(TypedDict):
    top_logprobs: list[_Likely]


class _Logprobs(TypedDict):
    content: NotRequired[list[_Place] | None]


class _Choice(TypedDict):
    message: _Message
    finish_reason: str
    logprobs: NotRequired[_Logprobs | None]


class _Usage(TypedDict):
    prompt_tokens: NotRequired[Count]
    completion_tokens: NotRequired[Count]


class _Reply(TypedDict):
    choices: list[_Choice]
    usage: NotRequired[_Usage | None]


class Refused(Exception):
    """The server will not answer this, however often it is asked."""


class Again(Exception):
    """This attempt failed; the next may not. `pause`: seconds that the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


def openai_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as servers take them: a call has an id and its arguments as JSON text, a tool's answer names its call.

    Answers come in the order of the calls. Other messages are as they were.
    """
    sent: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for number, message in enumerate(messages):
        one = dict(message)
        if calls := one.get("tool_calls"):
            open_calls = [f"call-{number}-{place}" for place in range(len(calls))]
            one["tool_calls"] = [_openai_call(name, call) for name, call in zip(open_calls, calls, strict=True)]
        elif one["role"] == "tool" and open_calls:
            one["tool_call_id"] = open_calls.pop(0)
        sent.append(one)
    return sent


def _openai_call(name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _choice(data: bytes, where: str) -> tuple[_Choice, _Usage]:
    """The only choice of a reply, and its tokens where they are counted.

    Raises `UserError` for no JSON, and `Again` for several choices.
    """
    reply = parse_json(data, _Reply, where, "ask again")
    if len(reply["choices"]) != 1:
        raise Again(f"{len(reply['choices'])} choices instead of one")
    return reply["choices"][0], reply.get("usage") or {}


def written(data: bytes, where: str, limit: int) -> dict[str, Any]:
    """A reply's answer. Raises as `_choice`, and `Again` for an answer that was cut without reason."""
    choice, usage = _choice(data, where)
    tokens = usage.get("completion_tokens")
    if choice["finish_reason"] not in ("stop", "length", "tool_calls"):
        raise Again(f"the answer ended by {choice['finish_reason']!r}")
    if choice["finish_reason"] == "length" and tokens is not None and tokens < limit:
        raise Again(f"the answer was cut after {tokens} of {limit} tokens")
    finished = choice["finish_reason"] != "length"
    return {
        "text": _text(choice["message"]),
        "finished": finished,
        "tokens": tokens,
        "asked": usage.get("prompt_tokens"),
    }


def likeliest(data: bytes, where: str) -> dict[str, Any]:
    """The likeliest first tokens of a reply. Raises as `_choice`, and `Refused` where the server gives none."""
    choice, _ = _choice(data, where)
    places = (choice.get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
    found = {
        one["token"]: one["logprob"] for one in reversed(places[0]["top_logprobs"])
    }  # of equal texts the likeliest
    if not found:
        raise Refused(
            f"{where} gives no log-probabilities (logprobs and top_logprobs of chat completions), which letters need; "
            "say --method generate, or score the model's folder"
        )
    return {"likeliest": found}


def _text(message: _Message) -> str:
    """Content, with reasoning and tool calls that the server took out of it as the model's own format has them."""
    text = message.get("content") or ""
    if reasoning := message.get("reasoning_content"):
        text = f"{reasoning}</think>{text}"
    for call in message.get("tool_calls") or ():
        text += _call_text(call["function"])
    return text


def _call_text(function: _Function) -> str:
    try:
        given = parse_json(function["arguments"] or "{}", dict[str, Any], "the arguments").items()
    except UserError:
        return f"<tool_call>\n<function={function['name']}>\n{function['arguments']}"  # broken, and judged so
    lines = [f"<parameter={name}>\n{_plain(value)}\n</parameter>" for name, value in given]
    return "\n".join(["<tool_call>", f"<function={function['name']}>", *lines, "</function>", "</tool_call>", ""])


def _plain(value: Any) -> str:
    if isinstance(value, str | bool) or value is None:
        return str(value)
    return json.dumps(value, ensure_ascii=False)
