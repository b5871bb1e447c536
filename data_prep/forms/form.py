"""What a form of rows is: how it is known, which keys it understands, and how its rows become chat rows.

The usual forms are in usual.py, those of named data sets in data_prep/sources/. A chat row has `messages` (`role`,
`content`, and what an assistant message may have besides), and may have `tools`, `id`, `source`, `weight`, and facts
for evaluation: `subject`, `level`, `split`, `answer`, `choices`.

A form knows its keys. A key that it does not know is listed when its name annotates a row or says nothing of prompt and
loss; otherwise the row is refused by that name. Nothing that could change what is trained is left out in silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nano3.cli import UserError
from nano3.row_keys import FACTS, LETTERS, is_harmless

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """One form: its `name`, what it is `about`, which `keys` it understands, by which of them a row is known
    (`known_by`: all of one of these sets), how it becomes a chat row, and which keys its publishers add that are
    `harmless` in it. `others` says what happens to keys that it does not know: "check" refuses telling ones, "ignore"
    lists all, "pass" hands them on to the reader of chat rows, which checks them."""

    name: str
    about: str
    keys: frozenset[str]
    known_by: tuple[frozenset[str], ...]
    chat: Callable[[dict[str, Any]], dict[str, Any]]
    harmless: frozenset[str] = frozenset()
    others: str = "check"

    def reason(self, fields: Fields) -> str | None:
        """Why a row is of this form ("it has 'a' and 'b'"), or None when it is not."""
        for names in self.known_by:
            if all(fields.get(name) is not None for name in names):
                return "it has " + " and ".join(repr(name) for name in sorted(names))
        return None


def to_chat(form: Form, fields: Fields, unused: Counter[str], ignored: Iterable[str] = ()) -> dict[str, Any]:
    """The chat row of a row of `form`; keys that are not used are counted in `unused`.

    Raises `UserError`, naming the key, for a row that lacks what the form needs, or has a key that would change prompt
    or loss and that the form does not understand. Keys in `ignored` are left out first.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    for key in ignored:
        given.pop(key, None)
    others = given.keys() - form.keys
    row = {key: given[key] for key in FACTS if key in others} | form.chat(given)
    for key in sorted(others.difference(FACTS)):
        if form.others == "pass":
            row.setdefault(key, given[key])
        elif (
            form.others == "check"
            and key not in form.harmless
            and not is_harmless(key, given[key], row.get("messages"))
        ):
            raise UserError(
                f"{key!r} may change prompt or loss, and the form {form.name} does not know it; place it with --map, "
                f"or say --ignore {key} if it changes neither"
            )
        unused[key] += 1
    return row


def guess(fields: Fields, forms: Sequence[Form]) -> tuple[Form, str]:
    """The form of a row, with the reason; of several the one that is known by most keys.

    Raises `UserError` with the row's keys and a proposed --map when no form fits.
    """
    found = [(form, reason) for form in forms if (reason := form.reason(fields))]
    if not found:
        given, empty = ([key for key, value in fields.items() if (value is None) == null] for null in (False, True))
        without = f" (and nothing in {', '.join(map(repr, empty))})" if empty else ""
        raise UserError(f"no known form has the keys {', '.join(map(repr, given))}{without}; {proposed_map(fields)}")
    return max(found, key=lambda pair: (pair[1].count("'"), -forms.index(pair[0])))


_ANSWER = re.compile(r"(?i)answer|output|response|target|label|solution|reply|completion")
_QUESTION = re.compile(r"(?i)question|quer|prompt|input|problem|instruct")


def proposed_map(fields: Fields) -> str:
    """A --map for a row of unknown form, from the names of its text fields."""
    texts = {key: value for key, value in fields.items() if isinstance(value, str)}
    answers = [key for key in texts if _ANSWER.search(key)]
    asked = [key for key in texts if key not in answers and _QUESTION.search(key)]
    others = sorted(texts.keys() - set(answers) - set(asked), key=lambda key: len(texts[key]), reverse=True)
    user = (asked or others or ["QUESTION"])[0]
    assistant = (answers or [key for key in others if key != user] or ["ANSWER"])[0]
    return f'name the parts, for example --map user="{{{user}}}" --map assistant="{{{assistant}}}"'


def keys(*sets: str) -> tuple[frozenset[str], ...]:
    """Sets of names from texts with blanks between them."""
    return tuple(frozenset(names.split()) for names in sets)


def all_keys(*sets: str) -> frozenset[str]:
    """All names of such sets together."""
    return frozenset().union(*keys(*sets))


def text_of(fields: Fields, key: str, empty: bool = False) -> str:
    """A field that must be text, and not blank unless `empty`."""
    value = fields.get(key, "" if empty else None)
    if not isinstance(value, str):
        raise UserError(f"{key!r} is {short(value)}; it must be text")
    if not empty and not value.strip():
        raise UserError(f"{key!r} is empty; give its text or remove the row")
    return value


def short(value: Any) -> str:
    """A value in at most 60 characters, for messages."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def with_choices(question: str, choices: list[str], context: str = "") -> str:
    """A multiple-choice question as the model is asked it: options on lines of their own, by letter."""
    lines = [f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)]
    head = f"{context.strip()}\n\n" if context.strip() else ""
    return head + question.strip() + "\n\n" + "\n".join(lines) + "\n\nAnswer with the letter of the right option."


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    """A message; what is empty in `more` is left out."""
    return {"role": role, "content": content} | {key: value for key, value in more.items() if value}


def chosen(question: str, choices: list[str], right: int, thought: str = "", context: str = "") -> dict[str, Any]:
    """The chat row of a multiple-choice question whose option number `right`, from 0, is the answer."""
    return {
        "messages": [
            turn("user", with_choices(question, choices, context)),
            turn("assistant", LETTERS[right], reasoning_content=thought.strip()),
        ],
        "answer": LETTERS[right],
        "choices": choices,
    }


_THOUGHTS = (
    re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL),
    re.compile(
        r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>"
        r"\s*<\|begin_of_solution\|>\s*(.*?)\s*(?:<\|end_of_solution\|>)?\s*",
        re.DOTALL,
    ),
)
"""Reasoning and answer in one text: with the model's own marks, and with those of OpenThoughts."""


def answered(content: str, **more: Any) -> dict[str, Any]:
    """An assistant message; reasoning that stands before the answer becomes `reasoning_content`."""
    match = next(filter(None, (form.fullmatch(content) for form in _THOUGHTS)), None)
    if match and "reasoning_content" not in more:
        more["reasoning_content"], content = match[1].strip(), match[2]
    return turn("assistant", content, **more)


def one_of(fields: Fields, names: tuple[str, ...]) -> str:
    """The one of these fields that the row has. Raises `UserError` when it has two of them."""
    found = [name for name in names if name in fields]
    if not found:
        raise UserError(f"the row has none of {', '.join(map(repr, names))}; it has {', '.join(map(repr, fields))}")
    if len(found) > 1:
        raise UserError(f"{found[0]!r} and {found[1]!r} are both given; say with --map which one counts")
    return found[0]
