"""The usual forms of rows: chat, ShareGPT, Alpaca, multiple choice, preference pairs, prompt and completion."""

from __future__ import annotations

from typing import Any

from data_prep.forms.choices import COLUMNS, FIELDS, options_of, right_option
from data_prep.forms.form import Fields, Form, all_keys, answered, chosen, keys, one_of, short, text_of, turn
from data_prep.forms.turns import message_of, messages_of, spoken, system_of, tools_of
from nano3.cli import UserError

_TALKS = ("conversations", "conversation")
_QUESTIONS = ("prompt", "question", "query", "input", "problem")
_ANSWERS = ("completion", "response", "answer", "output", "solution", "ideal")
_CONTEXTS = ("context", "passage", "article")
_REASONS = ("explanation", "rationale", "reasoning", "cot", "chain_of_thought")
_RIGHT = ("answer", "label", "answerKey", "correct_option", "correct_answer", "correct", "gold")
_ASKED = ("question", "query", "prompt", "question_stem")


def _messages(fields: Fields) -> dict[str, Any]:
    """`messages`, each in the usual spelling."""
    if "messages" not in fields:
        return {}  # the reader of chat rows says what the row looks like instead
    given = system_of(fields)
    row = tools_of(fields) | ({"system": given[0]["content"]} if given else {})
    return {**row, "messages": messages_of(fields, "messages")}


def _sharegpt(fields: Fields) -> dict[str, Any]:
    return {"messages": [*system_of(fields), *messages_of(fields, one_of(fields, _TALKS))]} | tools_of(fields)


def _alpaca(fields: Fields) -> dict[str, Any]:
    messages, question = system_of(fields), _instruction(fields)
    for number, pair in enumerate(fields.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"history[{number}] is {short(pair)}; it must be a question and its answer")
        messages += [turn("user", pair[0]), answered(pair[1])]
    reply = text_of(fields, one_of(fields, ("output", "response")))
    return {"messages": [*messages, question, answered(reply)]}


def _instruction(fields: Fields) -> dict[str, Any]:
    """The instruction, with the input or context that it is about."""
    question = text_of(fields, "instruction")
    about = [name for name in ("input", "context") if fields.get(name)]
    given = text_of(fields, one_of(fields, tuple(about)), empty=True) if about else ""
    return turn("user", f"{question}\n\n{given}" if given.strip() else question)


def _prompt_completion(fields: Fields) -> dict[str, Any]:
    asked, reply = one_of(fields, _QUESTIONS), one_of(fields, _ANSWERS)
    answer = fields[reply]
    if isinstance(answer, list) and reply == "ideal" and answer:
        answer = answer[0]
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    last = _turns({reply: answer}, reply, "assistant")
    if thought := _thought(fields):
        if isinstance(answer, list) or "reasoning_content" in last[0]:
            raise UserError(f"{reply!r} has its own reasoning beside {short(thought)}; say with --map which one counts")
        last[0] |= {"reasoning_content": thought}
    return {"messages": [*system_of(fields), *_turns(fields, asked, "user"), *last]} | tools_of(fields)


def _turns(fields: Fields, key: str, role: str) -> list[dict[str, Any]]:
    """A text as one turn of `role`, a message or a list of messages as they are."""
    value = fields.get(key)
    if isinstance(value, dict):
        return [message_of(key, value)]
    if isinstance(value, list) and value and not any(isinstance(one, str) for one in value):
        return messages_of(fields, key)
    text = text_of(fields, key)
    return [answered(text) if role == "assistant" else turn(role, text)]


def _thought(fields: Fields) -> str:
    """The reasoning that stands in a field of its own; NVIDIA's `reasoning`, on or off, is none."""
    given = [name for name in _REASONS if name in fields and str(fields[name]).lower() not in ("on", "off")]
    return text_of(fields, one_of(fields, tuple(given)), empty=True).strip() if given else ""


def _multiple_choice(fields: Fields) -> dict[str, Any]:
    options = options_of(fields)
    number = right_option(fields, options, one_of(fields, _RIGHT))
    contexts = [name for name in _CONTEXTS if name in fields]
    context = text_of(fields, one_of(fields, tuple(contexts)), empty=True) if contexts else ""
    return chosen(text_of(fields, one_of(fields, _ASKED)), options.texts, number, _thought(fields), context)


def _preference(fields: Fields) -> dict[str, Any]:
    """The chosen conversation; the rejected one is not trained on."""
    given = fields.get("chosen")
    reply = (spoken(given) if isinstance(given, str) else None) or _turns(fields, "chosen", "assistant")
    asked = _pair_question(fields)
    if reply[0].get("role") not in ("user", "system"):
        if not asked:
            raise UserError(
                "'chosen' is the answer alone and there is no 'prompt'; say with --map what the question is"
            )
        return {"messages": [*system_of(fields), *asked, *reply]} | tools_of(fields)
    said = [message.get("content") for message in reply]
    if not all(message.get("content") in said for message in asked):
        raise UserError("'chosen' answers another question than stands beside it; say with --map which one counts")
    return {"messages": [*system_of(fields), *reply]} | tools_of(fields)


def _pair_question(fields: Fields) -> list[dict[str, Any]]:
    """What the pair answers, where it stands in a field of its own."""
    if "instruction" in fields:
        return [_instruction(fields)]
    given = [name for name in (*_TALKS, "messages", "prompt", "question", "query", "input") if name in fields]
    return [message for name in given for message in _turns(fields, name, "user")]


_OPTIONS = (*FIELDS, *(f"{first} {second}" for first, second, *_ in COLUMNS))
"""Fields by which options are known: one with all of them, or the first two columns."""

FORMS = (
    Form(
        "messages",
        "chat rows: 'messages' with 'role' and 'content', OpenAI's tools and tool calls included",
        all_keys("messages tools functions system system_prompt"),
        keys("messages"),
        _messages,
        others="pass",
    ),
    Form(
        "sharegpt",
        "ShareGPT: 'conversations' with 'from' and 'value'",
        all_keys("conversations conversation system system_prompt tools functions"),
        keys(*_TALKS),
        _sharegpt,
    ),
    Form(
        "alpaca",
        "Alpaca: 'instruction', 'input', 'output'; 'system' and 'history' where there are some",
        all_keys("instruction input context output response system system_prompt history"),
        keys("instruction output", "instruction response"),
        _alpaca,
        harmless=all_keys("text"),
    ),
    Form(
        "multiple-choice",
        "a question with 'choices', 'options' or columns of them, and the right one by letter, text or number from 0",
        frozenset((*_ASKED, *FIELDS, *_RIGHT, *_CONTEXTS, *_REASONS, *(name for names in COLUMNS for name in names))),
        keys(
            *(f"{asked} {options} {right}" for asked in _ASKED for options in _OPTIONS for right in _RIGHT),
        ),
        _multiple_choice,
        harmless=all_keys("question_concept"),
    ),
    Form(
        "preference",
        "preference pairs: 'chosen' is trained on, 'rejected' is not",
        all_keys("prompt question query input instruction context chosen system system_prompt tools functions messages")
        | frozenset(_TALKS),
        keys("chosen rejected"),
        _preference,
        harmless=all_keys("rejected"),
    ),
    Form(
        "prompt-completion",
        "a prompt (or question) and its completion (or answer), as text or as lists of messages",
        frozenset((*_QUESTIONS, *_ANSWERS, *_REASONS, "system", "system_prompt", "tools", "functions")),
        keys(*(f"{asked} {answer}" for asked in _QUESTIONS for answer in _ANSWERS)),
        _prompt_completion,
    ),
)
"""A row that fits several is of the one that is known by most keys, then of the first."""
