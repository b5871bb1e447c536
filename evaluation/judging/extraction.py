"""What a model's text says its answer is: by rule, never by guess.

Each rule looks for one way of stating an answer. The first that finds anything decides. Where it finds two different
answers, or a statement further down contradicts it, the text is ambiguous, which is counted, and wrong. Where none
finds anything there is no answer: "Based on the findings" does not state B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nano3.boxed import boxes
from nano3.row_keys import LETTERS

THINK_END = "</think>"


@dataclass(frozen=True)
class Extracted:
    """An answer (None: there is none), the rule that found it, and whether the text states another one too."""

    answer: str | None
    rule: str
    ambiguous: bool = False


NOTHING = Extracted(None, "none")


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; the whole text where there is none."""
    return text.rpartition(THINK_END)[2]


def decide(rule: str, answers: Iterable[str], same: Callable[[str, str], bool] = str.__eq__) -> Extracted | None:
    """One answer, or several that are the same, of which the first stands; ambiguous when they differ, and then the
    last; None when there are none."""
    distinct: list[str] = []
    for one in answers:
        if not any(same(one, other) for other in distinct):
            distinct.append(one)
    if not distinct:
        return None
    return Extracted(distinct[-1], rule, ambiguous=len(distinct) > 1)


# Letters ------------------------------------------------------------------------------------------------------------

_ANSWER = r"(?:(?:final|correct|best|right)\s+)*(?:answer|option|choice|solution)s?"
_OF = r"(?:\s+(?:to|for|of|here|in)\b[^.:\n]{0,60}?)?"
_IS = r"\s*(?:(?:is|are|was|will\s+be|would\s+be|should\s+be|must\s+be|therefore|thus|clearly|probably)\b\s*|[=:]\s*)+"
_NAMED = r"(?:the\s+)?(?:option\s+|choice\s+|letter\s+|answer\s+)?:?\s*"
_OPENINGS = (
    rf"\b{_ANSWER}{_OF}(?:{_IS}|\s+[-–—]\s+){_NAMED}",  # the answer is, Answer:, the best option would be
    rf"\b(?:I|we)(?:['’]ll|['’]d|\s+would|\s+will|\s+shall)?\s+(?:choose|pick|select|go\s+with|answer)\s+{_NAMED}",
)
_CONCLUDING = r"\b(?:so|hence|thus|therefore|it['’]s|it\s+is)\b\s*[,:]?\s*"
"""With nothing but the letter after it."""
_END = r"(?=\s*(?:$|[.,;:!?)\]}\n(]|[-–—]\s)|\s+(?:because|since|as|for|which|due|given|instead|here|based)\b)"
_AND = r"\s*(?:,|/|&|\bor\b|\band\b)\s*(?:option\s+|choice\s+)?"
_IS_RIGHT = r"\s+is\s+(?:the\s+)?(?:most\s+)?(?:correct|right|best|answer)\b"


def _clean(text: str) -> str:
    r"""Without marks of Markdown, quotes, dollar signs and `\text{}` around words."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?i)<answer>\s*(.*?)\s*</answer>", r"\nAnswer: \1\n", text, flags=re.S)
    return re.sub(r"[*_`\"“”$]|\\[()\[\]]", "", text).strip()


def _mark(letters: str) -> str:
    """A capital, in brackets or not, or a small letter with a bracket after it or at the end of a line."""
    small = letters.lower()
    return rf"(?:[\[(]?[{letters}][)\]]?(?![A-Za-z'’])|[\[(]?[{small}][)\]]|[{small}](?=[.!]?[ \t]*(?:\n|$)))"


def _letters_in(text: str, letters: str) -> list[str]:
    return [one.upper() for one in re.findall(rf"(?<![A-Za-z])[{letters}{letters.lower()}](?![A-Za-z])", text)]


def choice(text: str, options: Sequence[str]) -> Extracted:
    """The letter that the text states for one of `options` (A is the first), thinking already cut off.

    Rules, in order: a box; nothing but the letter, with or without its option's text; a final answer; a stated answer;
    nothing but an option's text; a letter that leads with a mark or stands on a line of its own, where no other does; a
    letter that concludes ("So, B.").
    """
    letters, plain = LETTERS[: len(options)], _clean(text)
    final = [match.start() for match in re.finditer(r"(?i)\bfinal\s+(?:answer|choice)\b", plain)]
    stated = _stated_letters(plain, letters, options)
    boxed = [letter for content in boxes(text) if content for letter in _whole(_clean(content), letters, options)]
    if found := decide("boxed", boxed):
        return _against(found, stated)
    if found := decide("letter alone", _whole(plain, letters, options)):
        return found
    if found := decide("final answer", _stated_letters(plain[final[0] :], letters, options) if final else []):
        return found  # it may correct what stands before it
    if found := decide("stated", stated):
        return found
    if found := decide("leading letter", _leading(plain, letters)):
        return found
    concluded = re.findall(rf"(?i:{_CONCLUDING})({_mark(letters)}){_END}", plain, re.M)
    return decide("conclusion", _letters_in(" ".join(concluded), letters)) or NOTHING


def _against(found: Extracted, stated: Sequence[str]) -> Extracted:
    """Ambiguous too when the text states another letter beside its box."""
    return Extracted(found.answer, found.rule, found.ambiguous or any(one != found.answer for one in stated))


def _whole(text: str, letters: str, options: Sequence[str]) -> list[str]:
    """`B`, `(b)`, `Option B.`, `b) Atrophy`, `Atrophy`, `B and C`: letters and options that are all the text."""
    either = letters + letters.lower()
    if re.fullmatch(rf"(?i:option\s+|choice\s+)?[\[(]?[{either}][)\]]?(?:{_AND}\(?[{either}]\)?)*[.:)\]]*", text):
        return _letters_in(text, letters)
    marked = re.fullmatch(rf"(?i:option\s+|choice\s+)?\(?([{either}])[).:\]]+\s*(.+)", text, re.S)
    if marked and _same_text(marked[2], options[letters.index(marked[1].upper())]):
        return [marked[1].upper()]
    return [letter for letter, option in zip(letters, options, strict=True) if _same_text(text, option)]


def _stated_letters(text: str, letters: str, options: Sequence[str]) -> list[str]:
    """All letters that are stated as the answer: "B or C" states two, "not B" none, "a common cause" none.

    An option's own text counts as its letter.
    """
    mark, found = _mark(letters), []
    texts = "|".join(re.escape(option) for option in map(_clean, options) if option)
    for opening in _OPENINGS:
        pattern = rf"(?i:{opening}(?:either\s+|both\s+)?)({mark}(?:{_AND}{mark})*){_END}"
        found += [(match.start(), _letters_in(match[1], letters)) for match in re.finditer(pattern, text, re.M)]
        for match in re.finditer(rf"(?i:{opening}({texts})){_END}", text, re.M):
            found.append((match.start(), _whole(match[1], letters, options)))
    subject = rf"(?:(?i:\b(?:option|choice|answer)\s+)|(?:^|(?<=[.\n,;:]))\s*)({mark}){_IS_RIGHT}"
    found += [(match.start(), _letters_in(match[1], letters)) for match in re.finditer(subject, text, re.M)]
    return [letter for _, several in sorted(found) for letter in several]


def _leading(text: str, letters: str) -> list[str]:
    """`B) because ...`, `B, since ...`, or a line that is a letter: it, and all others that begin a line like that."""
    alone = re.findall(rf"^[ \t]*[\[(]?([{letters}])[)\].:]*[ \t]*$", text, re.M)
    reason = re.match(rf"[\[(]?([{letters}])[)\]]?,?\s+(?:because|since|as)\b", text)
    if alone or reason:
        return [*alone, *([reason[1]] if reason else [])]
    mark = rf"(?:\([{letters}]\)|[{letters}][).:])(?=\s|$)"
    return _letters_in(" ".join(re.findall(rf"^\s*({mark})", text, re.M)), letters) if re.match(mark, text) else []


def _same_text(text: str, option: str) -> bool:
    return bool(option.strip()) and _comparable(text) == _comparable(option)


def _comparable(text: str) -> str:
    return " ".join(_clean(text).rstrip(".").casefold().split())


# Stated values ------------------------------------------------------------------------------------------------------

_VALUE = (
    r"(?P<value>\$\$?[^$\n]+\$\$?(?:\s*%)?|\\\(.+?\\\)|\\\[.+?\\\]|[^\n]+?)"
    r"(?=\s*(?:$|\n|\.(?:\s|$)|!|;|\s(?:because|since|as|so|which|if|when|after)\b|\s\())"
)
_STATED_VALUE = rf"\b{_ANSWER}{_OF}{_IS}"


def value(text: str, same: Callable[[str, str], bool]) -> Extracted:
    r"""A number or an expression that the text states as its answer, thinking already cut off.

    Rules, in order: a box; a line `#### value`, as GSM8K ends; a final answer; a stated answer; a text of one line that
    is short enough to be the value itself; a last line that concludes ("So ...", "Therefore ...") and has one number,
    or an equation. `same` says whether two values are equal: `\boxed{0.5}` and `\boxed{1/2}` do not contradict.
    """
    text = re.sub(r"(?i)<answer>\s*(.*?)\s*</answer>", r"\nAnswer: \1\n", text, flags=re.S).strip()
    rules = (
        ("boxed", [content for content in boxes(text) if content]),
        ("hashes", [found.strip() for found in re.findall(r"^\s*####\s*(.+)$", text, re.M)]),
        ("final answer", _stated_values(text, final=True)),
        ("stated", _stated_values(text, final=False)),
        ("conclusion", _conclusion(text)),
        ("value alone", [_bare(text)] if text and "\n" not in text and len(_bare(text).split()) <= 4 else []),
    )
    decided = (decide(rule, filter(None, found), same) for rule, found in rules)
    return next(filter(None, decided), NOTHING)


def _stated_values(text: str, final: bool) -> list[str]:
    if final:
        openings = [match.start() for match in re.finditer(r"\bfinal\s+answer\b", text, re.I)]
        text = text[openings[0] :] if openings else ""
    text = re.sub(r"[*_]{2}", "", text)
    found = [match["value"].strip() for match in re.finditer(rf"(?i:{_STATED_VALUE}){_VALUE}", text, re.M)]
    several = [_bare(part) for one in found for part in re.split(r"\s+or\s+", one)]
    return [one for one in several if not re.match(r"(?i:not\b|n't|unclear|unknown|either\s+unclear)", one)]


def _bare(text: str) -> str:
    """Without words before a value that do not change what it is."""
    return re.sub(
        r"(?i)^(?:it\s+is|it['’]s|approximately|about|around|roughly|exactly|equal\s+to|≈|~)\s+", "", text.strip()
    )


def _conclusion(text: str) -> list[str]:
    lines = text.splitlines()
    if not lines or not re.match(r"(?i)\W*(?:so|therefore|thus|hence|in total|altogether|consequently)\b", lines[-1]):
        return []
    last = lines[-1].rpartition("=")[2]
    numbers = re.findall(NUMBER, last)
    return numbers if len(numbers) == 1 else []


NUMBER = r"(?<![\w.])[-−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|\.\d)"
"""A plain number in running text, thousands with commas or without, perhaps with a dollar sign."""
