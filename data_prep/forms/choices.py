"""Options of a multiple-choice row, and which of them is right, in the field's spellings.

Options are a list, an object by letter, `{"text": [...], "label": [...]}` as ARC has it, a list of objects, or columns
such as A to D or option_a to option_d. The right one is named by its label, its letter, its text or its number from 0.
Where two of these readings name different options, the row is refused.
"""

from __future__ import annotations

import re
from itertools import takewhile, zip_longest
from typing import Any, NamedTuple

from data_prep.forms.form import Fields, one_of, short
from data_prep.forms.turns import decoded
from nano3.cli import UserError
from nano3.row_keys import LETTERS

FIELDS = ("choices", "options", "answers")
_ALPHABETS = (LETTERS, LETTERS.lower(), "123456789", "0123456789")
_PREFIXES = ("", "option", "option_", "op", "opt", "choice", "choice_", "answer_")
COLUMNS = tuple(
    tuple(prefix + letter for letter in alphabet)
    for prefix in _PREFIXES
    for alphabet in _ALPHABETS
    if prefix or alphabet == LETTERS
)
"""Names that columns of options have, in order."""
_BY_LENGTH = sorted(_PREFIXES, key=len, reverse=True)
_TEXTS, _LABELS = ("text", "value", "content", "option"), ("label", "key", "letter", "id")
_PREFIXED = re.compile(r"\(?([A-Ja-j])[).:]\s*(.+)", re.DOTALL)


class Options(NamedTuple):
    """Texts of the options, what the row itself calls each (`labels`, empty where it calls them nothing), and whether
    the row gives them as `numbers`."""

    texts: list[str]
    labels: list[str]
    numbers: bool


def options_of(fields: Fields) -> Options:
    """The options of a row. Raises `UserError` for fewer than 2, more than there are letters, or one without text."""
    key, found = _found(fields)
    texts = [str(text) if _is_number(text) else text for text, _ in found]
    labels = [str(label).strip() for _, label in found if label is not None]
    if not 2 <= len(texts) <= len(LETTERS):
        raise UserError(f"{key!r} is {short(fields.get(key))}; give 2 to {len(LETTERS)} options")
    for place, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{key}[{place}] is {short(text)}; it must be text")
    if len(labels) != len(texts):
        labels = []
    matches = [_PREFIXED.fullmatch(text.strip()) for text in texts]
    if all(match and match[1].upper() == letter for match, letter in zip(matches, LETTERS, strict=False)):
        texts = [match[2] for match in matches if match]  # "A. Paris" beside the letter that is written anyway
    return Options(texts, labels, any(_is_number(text) for text, _ in found))


def _found(fields: Fields) -> tuple[str, list[tuple[Any, Any]]]:
    """The field that has the options, and (text, label or None) of each."""
    if not any(name in fields for name in FIELDS):
        names = max((list(takewhile(fields.__contains__, names)) for names in COLUMNS), key=len)
        if names:
            prefix = next(prefix for prefix in _BY_LENGTH if names[0].startswith(prefix))
            return names[0], [(fields[name], name.removeprefix(prefix)) for name in names]
    key = one_of(fields, FIELDS)
    value = decoded(fields[key], key)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = value.get("label")
        return key, list(zip_longest(value["text"], labels if isinstance(labels, list) else []))
    if isinstance(value, dict):
        return key, [(value[name], name) for name in sorted(value) if value[name] is not None]
    if isinstance(value, list):
        return key, [_one(option) for option in value]
    return key, []


def _one(option: Any) -> tuple[Any, Any]:
    if not isinstance(option, dict):
        return option, None
    text = next((option[name] for name in _TEXTS if option.get(name) is not None), None)
    return text, next((option[name] for name in _LABELS if option.get(name) is not None), None)


def right_option(fields: Fields, options: Options, key: str) -> int:
    """Which option the field `key` names, from 0.

    Raises `UserError` where it names none, or different ones in different readings: a number in text may count from 0
    or from 1, and nobody can tell from one row.
    """
    value = fields[key]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what pandas makes of whole numbers beside a null
    named = _readings(value, options)
    if len(named) == 1:
        return named.pop()
    last = LETTERS[len(options.texts) - 1]
    what = f"{key!r} is {short(value)}"
    if named:
        names = " and ".join(LETTERS[place] for place in sorted(named))
        raise UserError(
            f"{what}, which may name {names}: by label, by text or by number; name the options A, B, ... and give the "
            "letter"
        )
    digits = isinstance(value, str) and value.strip().isdigit()
    why = " (a number in text may count from 0 or from 1)" if digits else ""
    raise UserError(
        f"{what}{why}; give a letter from A to {last}, the text of one option, or its number from 0 to "
        f"{len(options.texts) - 1}"
    )


def _readings(value: Any, options: Options) -> set[int]:
    """Every option that a value may name."""
    texts, labels, numbers = options
    if not (isinstance(value, str) or _is_number(value)):
        return set()
    said = str(value).strip()
    bare = said.strip("().").casefold()
    named = {place for place, label in enumerate(labels) if label.casefold() == bare}
    if isinstance(value, str) or numbers:
        same = [place for place, text in enumerate(texts) if text.strip() == said]
        same = same or [place for place, text in enumerate(texts) if text.strip().casefold() == said.casefold()]
        named |= set(same) if len(same) == 1 else set()
    if isinstance(value, int):
        return named | ({value} & set(range(len(texts))))
    letters = [letter.casefold() for letter in LETTERS[: len(texts)]]
    if not any(label.casefold() in letters for label in labels):  # labels that are letters say more than ours
        named |= {letters.index(bare)} if bare in letters else set()
    match = _PREFIXED.fullmatch(said)
    if match and match[1].casefold() in letters:  # "B. Paris"
        place = letters.index(match[1].casefold())
        named |= {place} if texts[place].strip().casefold() == match[2].strip().casefold() else set()
    return named


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
