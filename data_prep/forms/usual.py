"""The usual forms of rows: chat, ShareGPT, Alpaca, multiple choice, preference pairs, prompt and completion."""

from __future__ import annotations

from typing import Any

from data_prep.forms.form import (
    Fields,
    Form,
    all_keys,
    answer_number,
    answered,
    choices_of,
    chosen,
    keys,
    one_of,
    short,
    text_of,
    turn,
)
from nano3.cli import UserError
from nano3.documents import parse_json


def _messages(fields: Fields) -> dict[str, Any]:
    """`messages` as they are; OpenAI's parts of text and `function_call` are brought to the usual spelling."""
    if "messages" not in fields:
        return {}  # the reader of chat rows says what the row looks like instead
    messages = fields["messages"]
    if not isinstance(messages, list):
        raise UserError(f"'messages' is {short(messages)}; it must be a list of messages")
    row = {key: fields[key] for key in ("tools", "functions", "system") if fields.get(key)}
    return {**row, "messages": [_openai(number, message) for number, message in enumerate(messages)]}


def _openai(number: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = "".join(_text_part(number, part) for part in content)
    if "function_call" in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if message.get("role") == "function":
        message["role"] = "tool"
    if message.get("role") == "assistant" and isinstance(message.get("content"), str):
        message |= answered(**{key: value for key, value in message.items() if key != "role"})
    return message


def _text_part(number: int, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UserError(f"messages[{number}]: a part of the content is {short(part)}; only text can be trained on")
    return part["text"]


_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
_SHAREGPT_TURN = {"from", "value", "weight", "loss"}


def _sharegpt(fields: Fields) -> dict[str, Any]:
    turns = fields.get("conversations")
    if not isinstance(turns, list):
        raise UserError(f"'conversations' is {short(turns)}; it must be a list of turns")
    row: dict[str, Any] = {"messages": [_sharegpt_turn(number, one) for number, one in enumerate(turns)]}
    if fields.get("system"):
        row["messages"].insert(0, turn("system", text_of(fields, "system")))
    if fields.get("tools"):
        row["tools"] = _decoded(fields, "tools")
    return row


def _sharegpt_turn(number: int, one: Any) -> dict[str, Any]:
    where = f"conversations[{number}]"
    if not isinstance(one, dict):
        raise UserError(f"{where} is {short(one)}; it must be an object with 'from' and 'value'")
    if "role" in one and "from" not in one:
        one = {"from" if key == "role" else "value" if key == "content" else key: one[key] for key in one}
    one = {key: value for key, value in one.items() if value is not None}
    unknown = sorted(key for key in one if key not in _SHAREGPT_TURN and one[key] not in ("", [], {}))
    if unknown:
        raise UserError(f"{where} has {unknown[0]!r}, which ShareGPT's form does not know; remove it")
    role = _SHAREGPT_ROLES.get(one.get("from")) if isinstance(one.get("from"), str) else None
    if role is None:
        raise UserError(f"{where}: 'from' is {short(one.get('from'))}; it must be one of {', '.join(_SHAREGPT_ROLES)}")
    value = text_of(one, "value", empty=True)
    more = {key: one[key] for key in ("weight", "loss") if key in one}
    return (answered(value) if role == "assistant" else turn(role, value)) | more


def _decoded(fields: Fields, key: str) -> Any:
    """A list, or one as JSON text."""
    value = fields[key]
    if isinstance(value, str):
        try:
            value = parse_json(value, Any, f"{key!r}")
        except UserError as error:
            raise UserError(f"{key!r} is text but not JSON ({error})") from error
    if not isinstance(value, list):
        raise UserError(f"{key!r} is {short(value)}; it must be a list")
    return value


def _alpaca(fields: Fields) -> dict[str, Any]:
    question = text_of(fields, "instruction")
    given = text_of(fields, "input", empty=True)
    messages = [turn("system", text_of(fields, "system"))] if fields.get("system") else []
    for number, pair in enumerate(fields.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"history[{number}] is {short(pair)}; it must be a question and its answer")
        messages += [turn("user", pair[0]), answered(pair[1])]
    question = f"{question}\n\n{given}" if given.strip() else question
    return {"messages": [*messages, turn("user", question), answered(text_of(fields, "output"))]}


_QUESTIONS = ("prompt", "question", "query", "input", "problem")
_ANSWERS = ("completion", "response", "answer", "output", "solution", "ideal")


def _prompt_completion(fields: Fields) -> dict[str, Any]:
    asked, reply = one_of(fields, _QUESTIONS), one_of(fields, _ANSWERS)
    messages = _turns(fields, asked, "user")
    system = [turn("system", text_of(fields, "system"))] if fields.get("system") else []
    answer = fields[reply]
    if isinstance(answer, list) and reply == "ideal" and answer:
        answer = answer[0]
    last = _turns({reply: answer}, reply, "assistant")
    row = {key: fields[key] for key in ("tools",) if fields.get(key)}
    return {**row, "messages": [*system, *messages, *last]}


def _turns(fields: Fields, key: str, role: str) -> list[dict[str, Any]]:
    """A text as one turn of `role`, or a list of messages as it is."""
    if isinstance(fields[key], list):
        return _messages({"messages": fields[key]})["messages"]
    text = text_of(fields, key)
    return [answered(text) if role == "assistant" else turn(role, text)]


_CONTEXTS = ("context", "passage", "article")
_REASONS = ("explanation", "rationale")


def _multiple_choice(fields: Fields) -> dict[str, Any]:
    choices = choices_of(fields)
    asked = one_of(fields, _ASKED)
    number = answer_number(fields, choices, one_of(fields, _RIGHT))
    context, thought = (
        text_of(fields, one_of(fields, names), empty=True) if any(name in fields for name in names) else ""
        for names in (_CONTEXTS, _REASONS)
    )
    return chosen(text_of(fields, asked), choices, number, thought, context)


def _preference(fields: Fields) -> dict[str, Any]:
    """The chosen conversation; the rejected one is not trained on."""
    if isinstance(fields.get("chosen"), list):
        messages = _turns(fields, "chosen", "assistant")
        asked = messages and isinstance(messages[0], dict) and messages[0].get("role") in ("user", "system")
        if not asked and "prompt" in fields:
            messages = _turns(fields, "prompt", "user") + messages
    else:
        if "prompt" not in fields and "question" not in fields:
            raise UserError("'chosen' is text and there is no 'prompt'; say with --map what the question is")
        messages = _turns(fields, one_of(fields, ("prompt", "question")), "user")
        messages += [answered(text_of(fields, "chosen"))]
    system = [turn("system", text_of(fields, "system"))] if fields.get("system") else []
    return {"messages": [*system, *messages]}


_CHOICES = ("choices", "options", "answers")
_RIGHT = ("answer", "label", "answerKey", "correct_option", "gold")
_ASKED = ("question", "query", "prompt")

FORMS = (
    Form(
        "messages",
        "chat rows: 'messages' with 'role' and 'content', OpenAI's tools and tool calls included",
        all_keys("messages tools functions system"),
        keys("messages"),
        _messages,
        others="pass",
    ),
    Form(
        "sharegpt",
        "ShareGPT: 'conversations' with 'from' and 'value'",
        all_keys("conversations system tools"),
        keys("conversations"),
        _sharegpt,
    ),
    Form(
        "alpaca",
        "Alpaca: 'instruction', 'input', 'output'; 'system' and 'history' where there are some",
        all_keys("instruction input output system history"),
        keys("instruction output"),
        _alpaca,
        harmless=all_keys("text"),
    ),
    Form(
        "multiple-choice",
        "a question with 'choices' or 'options', and the right one by letter, text or number from 0",
        frozenset((*_ASKED, *_CHOICES, *_RIGHT, *_CONTEXTS, *_REASONS)),
        keys(*(f"{asked} {choices} {right}" for asked in _ASKED for choices in _CHOICES for right in _RIGHT)),
        _multiple_choice,
    ),
    Form(
        "preference",
        "preference pairs: 'chosen' is trained on, 'rejected' is not",
        all_keys("prompt question chosen system"),
        keys("chosen rejected"),
        _preference,
        harmless=all_keys("rejected"),
    ),
    Form(
        "prompt-completion",
        "a prompt (or question) and its completion (or answer), as text or as lists of messages",
        frozenset((*_QUESTIONS, *_ANSWERS, "system", "tools")),
        keys(*(f"{asked} {answer}" for asked in _QUESTIONS for answer in _ANSWERS)),
        _prompt_completion,
    ),
)
"""A row that fits several is of the one that is known by most keys, then of the first."""
