"""Whether an answer is right, and if not, in which way it fails. One function for each kind of answer.

Each judge takes what is expected and the text that the model gave as its answer, thinking cut off, and returns a
`Verdict`. A text that was cut at the token limit is judged by nobody: it is `unfinished` whatever it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from evaluation.judging.extraction import Extracted, choice, value
from evaluation.judging.mathematics import close, equal
from nano3.cli import UserError
from nano3.documents import parse_json

RIGHT, WRONG = "right", "wrong"
OUTCOMES = {
    RIGHT: "right",
    WRONG: "an answer, and not the expected one",
    "format": "the expected answer, not in the form that was asked for",
    "ambiguous": "more than one answer",
    "unparsed": "no answer found",
    "unfinished": "cut at the token limit",
}
"""What can become of a question, and the words for it. Only the first counts."""


@dataclass(frozen=True)
class Verdict:
    """One of `OUTCOMES`, the answer that was found (None: none), and the rule that found it."""

    outcome: str
    answer: str | None = None
    rule: str = ""


UNFINISHED = Verdict("unfinished")


def normalize(text: str) -> str:
    """An answer as `exact` compares it: outer white space removed, every inner run of white space one space."""
    return " ".join(text.split())


def exact(expected: str, answer: str) -> Verdict:
    """Equal after `normalize`; case, punctuation and digits count. Equal without case and punctuation is `format`."""
    given = normalize(answer)
    if not given:
        return Verdict("unparsed")
    if given == normalize(expected):
        return Verdict(RIGHT, given, "exact")
    same = _letters_and_digits(given) == _letters_and_digits(expected) != ""
    return Verdict("format" if same else WRONG, given, "exact")


def _letters_and_digits(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\W_]+", "", text.casefold())


def letter(expected: str, answer: str, options: Sequence[str]) -> Verdict:
    """The letter `expected` for one of `options`, by the rules of `extraction.choice`."""
    return _verdict(choice(answer, options), lambda found: found == expected)


def mathematics(expected: str, answer: str) -> Verdict:
    """A number or an expression equal to `expected` (`evaluation.judging.mathematics.equal`), by `extraction.value`."""
    return _verdict(value(answer, equal), partial(equal, expected))


def number(expected: str, answer: str, tolerance: float = 0.0, boxed: bool = False) -> Verdict:
    """A number within `tolerance` times the larger of the two; with `boxed` one that stands outside a box is `format`.

    What is no number, or a string of at least four binary digits, is compared as text. Signs count where a text has
    nothing else.
    """

    def same(first: str, second: str) -> bool:
        if any(re.fullmatch(r"[01]{4,}", side) or not _letters_and_digits(side) for side in (first, second)):
            return normalize(first) == normalize(second)
        return close(first, second, tolerance) or _letters_and_digits(first) == _letters_and_digits(second)

    found = value(answer, same)
    verdict = _verdict(found, partial(same, expected))
    if boxed and verdict.outcome == RIGHT and found.rule != "boxed":
        return Verdict("format", verdict.answer, verdict.rule)
    return verdict


def _verdict(found: Extracted, right: Callable[[str], bool]) -> Verdict:
    if found.answer is None:
        return Verdict("unparsed", None, found.rule)
    if found.ambiguous:
        return Verdict("ambiguous", found.answer, found.rule)
    return Verdict(RIGHT if right(found.answer) else WRONG, found.answer, found.rule)


def scored(expected: Any, answer: str, score: Callable[[str, Any], float]) -> Verdict:
    """By a generator's own function: `score(answer, expected)` of 1 is right, between 0.99 and 0 is not."""
    if not answer.strip():
        return Verdict("unparsed")
    found = value(answer, lambda first, second: first == second)
    texts = dict.fromkeys(
        (answer.strip(), *((found.answer,) if found.rule in ("boxed", "final answer", "stated") else ()))
    )
    if found.ambiguous and found.rule == "boxed":
        return Verdict("ambiguous", found.answer, found.rule)
    best = max(texts, key=lambda text: float(score(text, expected)))
    right = float(score(best, expected)) >= 0.99
    return Verdict(RIGHT if right else WRONG, best, "score_answer")


# Tool calls ---------------------------------------------------------------------------------------------------------

_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", re.S)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.S)

Accepted = Mapping[str, Mapping[str, Any]]
"""Function -> argument -> list of the values that are accepted, or the only one; "" among them: the argument may be
left out."""


def tool_calls(expected: Sequence[Accepted], answer: str) -> Verdict:
    """The calls of the model's format, in any order, each with accepted arguments and no others.

    `expected` as BFCL gives it, one mapping with one function for each call; empty where no tool fits: then any call is
    wrong. A call that does not close, or JSON in its place, is `format` where its function is right, else `unparsed`.
    """
    calls = [(name.strip(), dict(_PARAMETER.findall(body))) for name, body in _CALL.findall(answer)]
    shown = json.dumps(calls, ensure_ascii=False)
    broken = answer.count("<tool_call>") != len(calls) or ("<function=" in answer and not calls)
    if broken or (expected and not calls):
        named = all(name in answer for call in expected for name in call)
        marked = "<tool_call>" in answer or "{" in answer
        return Verdict("format" if expected and named and marked else "unparsed", None, "tool call")
    left = list(expected)
    for name, arguments in calls:
        fits = next((call for call in left if name in call and _accepts(call[name], arguments, _same_value)), None)
        if fits is None:
            return Verdict(WRONG, shown, "tool call")
        left.remove(fits)
    return Verdict(WRONG if left else RIGHT, shown, "tool call")


def _accepts(accepted: Mapping[str, Any], given: Mapping[str, Any], same: Callable[[Any, Any], bool]) -> bool:
    """Whether every argument has an accepted value by `same`, or may be left out and is, and none is unknown."""

    def several(values: Any) -> Sequence[Any]:
        return values if isinstance(values, list) else [values]

    return set(given) <= set(accepted) and all(
        any(same(one, given[name]) for one in several(values)) if name in given else "" in several(values)
        for name, values in accepted.items()
    )


def _same_value(value: Any, text: str) -> bool:
    """Whether a parameter's text is this value: strings as they are, all else as JSON or as Python writes it."""
    if isinstance(value, str):
        return value == text or _letters_and_digits(value) == _letters_and_digits(text) != ""
    if isinstance(value, bool) or value is None:
        return text.strip() in (str(value), json.dumps(value))
    try:
        parsed = parse_json(text, Any, "the answer")
    except UserError:
        return False
    return _same_parsed(value, parsed)


def _same_parsed(value: Any, parsed: Any) -> bool:
    """As BFCL compares inside lists and objects: whole numbers equal their floats; an object's values are lists of
    accepted ones."""
    if isinstance(value, bool) or value is None:
        return parsed is value
    if isinstance(value, Mapping):
        return isinstance(parsed, Mapping) and _accepts(value, parsed, _same_parsed)
    if isinstance(value, list):
        return isinstance(parsed, list) and len(value) == len(parsed) and all(map(_same_parsed, value, parsed))
    if isinstance(value, str):
        return isinstance(parsed, str) and _letters_and_digits(value) == _letters_and_digits(parsed)
    return type(parsed) in (int, float) and bool(value == parsed)
