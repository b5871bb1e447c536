"""Turns of conversations in the field's spellings -> messages with `role` and `content`.

Understood are OpenAI's messages, ShareGPT's `from` and `value`, LLaMA-Factory's `function_call`, lists that a CSV or
parquet column holds as JSON text, and the struct of lists that Arrow makes of a list of structs.
"""

from __future__ import annotations

import re
from typing import Any

from data_prep.forms.form import Fields, answered, short, text_of, turn
from nano3.cli import UserError
from nano3.documents import parse_json

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""What others call a role -> ours; `call` is an assistant that calls a tool, as JSON."""
_PLAIN = tuple(role for role, ours in ROLES.items() if role == ours)
_SHAREGPT = {"from", "value", "weight", "loss"}
_REASONING = ("reasoning", "thinking")
"""What servers and data sets call `reasoning_content`."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_SPOKEN = re.compile(r"\n\n(Human|Assistant):")


def messages_of(fields: Fields, key: str) -> list[Any]:
    """The turns in a field as messages. Raises `UserError`, naming the turn, for one that cannot be understood."""
    value = decoded(fields[key], key)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = _rows_of_columns(key, value)
    if not isinstance(value, list):
        raise UserError(f"{key!r} is {short(value)}; it must be a list of messages")
    return [one if _is_message(one) else message_of(f"{key}[{number}]", one) for number, one in enumerate(value)]


def _is_message(one: Any) -> bool:
    """Whether a turn is a plain message already, as most are: a role of ours and a text with no mark before it."""
    if not isinstance(one, dict) or len(one) != 2 or one.get("role") not in _PLAIN:
        return False
    content = one.get("content")
    return isinstance(content, str) and not content.lstrip().startswith("<")


def message_of(where: str, one: Any) -> dict[str, Any]:
    """One turn as a message; what it has besides is left for the reader of chat rows to judge."""
    if not isinstance(one, dict):
        raise UserError(f"{where} is {short(one)}; it must be an object with 'role' and 'content'")
    one = {key: value for key, value in one.items() if value is not None}
    if "from" in one and "role" not in one:
        one = _from_sharegpt(where, one)
    role = one.get("role")
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known == "call":
        return {"role": "assistant", "tool_calls": _calls(where, one.get("content"))}
    message = one | ({"role": known} if known else {})
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_part(where, part) for part in message["content"])
    return _assistant(message) if known == "assistant" else message


def tools_of(fields: Fields) -> dict[str, Any]:
    """The row's `tools` or `functions`, or nothing; each may be JSON text."""
    found = {}
    for key in ("tools", "functions"):
        value = decoded(fields.get(key) or [], key)
        if value:
            found[key] = [decoded(one, key) for one in value] if isinstance(value, list) else value
    return found


def system_of(fields: Fields) -> list[dict[str, Any]]:
    """The system message that a row's `system` or `system_prompt` gives, or none."""
    given = [key for key in ("system", "system_prompt") if fields.get(key)]
    if len(given) > 1 and fields[given[0]] != fields[given[1]]:
        raise UserError("'system' and 'system_prompt' are both given; keep one")
    return [turn("system", text_of(fields, given[0]))] if given else []


def spoken(text: str) -> list[dict[str, Any]] | None:
    """The messages of a transcript by "Human:" and "Assistant:", as Anthropic's pairs are; None for another text."""
    parts = _SPOKEN.split(text)
    if len(parts) < 3 or parts[0].strip():
        return None
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [answered(said.strip()) if who == "Assistant" else turn("user", said.strip()) for who, said in turns]


def decoded(value: Any, key: str) -> Any:
    """A list or object that a column holds as JSON text; anything else is as it was."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, Any, f"{key!r}") if value.strip() else []
    except UserError as error:
        raise UserError(f"{key!r} is {short(value)}; text in its place must be JSON") from error


def _rows_of_columns(key: str, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    if len({len(column) for column in columns.values()}) != 1:
        raise UserError(f"{key!r} has columns of different lengths; give a list of messages")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _from_sharegpt(where: str, one: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(key for key in one if key not in _SHAREGPT and one[key] not in ("", [], {}))
    if unknown:
        raise UserError(f"{where} has {unknown[0]!r}, which ShareGPT's form does not know; remove it")
    if not isinstance(one["from"], str) or one["from"].strip().lower() not in ROLES:
        raise UserError(f"{where}: 'from' is {short(one['from'])}; it must be one of {', '.join(ROLES)}")
    more = {key: one[key] for key in ("weight", "loss") if key in one}
    return {"role": one["from"], "content": text_of(one, "value", empty=True)} | more


def _calls(where: str, content: Any) -> list[Any]:
    """The calls of a turn that is nothing else."""
    calls = decoded(content, f"{where}, a call")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and call.get("name") for call in calls):
        raise UserError(f'{where} is {short(content)}; a call must be JSON such as {{"name": "f", "arguments": {{}}}}')
    return [{"type": "function", "function": call} for call in calls]


def _text_part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise UserError(f"{where}: a part of the content is {short(part)}; only text can be trained on")
    return part["text"]


def _assistant(message: dict[str, Any]) -> dict[str, Any]:
    """Calls and reasoning under their usual names."""
    if "function_call" in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if "tool_calls" in message:
        message["tool_calls"] = decoded(message["tool_calls"], "tool_calls")
    named = [key for key in _REASONING if isinstance(message.get(key), str)]
    if named and "reasoning_content" not in message:
        message["reasoning_content"] = message.pop(named[0])
    if isinstance(message.get("content"), str):
        message |= answered(**{key: value for key, value in message.items() if key != "role"})
    return message
