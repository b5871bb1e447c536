r"""Whether two mathematical answers are equal: plain numbers exactly, everything else by `math-verify`.

What `math-verify` 0.9.0 does unless one knows it, and what is done about it here:

- An answer that is not in `$...$` or a box may be read as the wrong part of itself: both sides are wrapped.
- "(1,2)" is an open interval for it: two answers of that form are compared as tuples, part by part.
- A letter or a word parses to nothing, and nothing equals nothing: such answers are compared as text.
- Its time limit is an alarm, which only the main thread may set: in another thread there is none. So an answer that
  could take for ever, with towers of powers or hundreds of characters, is compared as text in any thread.
"""

from __future__ import annotations

import logging
import re
import threading
from fractions import Fraction

SECONDS = 5
"""At most for one parse and for one comparison."""
LONGEST = 300
"""Characters of an expression that is handed to the parser."""

_UNSAFE = re.compile(r"\^\s*\{?[^{}]*\^|\^\s*\{?\s*-?\d{4,}|\*\*|\d{40,}|!\s*!|\d{4,}\s*!")
"""Towers of powers, four-digit exponents and the like, whose value does not fit into memory."""
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*([-−]?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([-−]?[\d.,]+)\s*\}|(\d))")
_NUMBER = r"[-−+]?\s*(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_PLAIN = re.compile(
    rf"(?P<sign>[-−+]?)\s*(?:[€£¥₹]|USD|EUR|Rs\.?)?\s*(?P<first>{_NUMBER})(?:\s*/\s*(?P<below>{_NUMBER}))?"
    r"(?P<unit>\s*(?:[%°º]|[A-Za-z°/·\s]|\.(?!\d)|\^\{?-?\d\}?(?![\d.,])|[²³])*)"
)
_NO_UNIT = {
    *("million", "thousand", "hundred", "billion", "dozen", "or", "and", "to", "more", "less", "than", "not", "if"),
    *("pi", "sqrt", "ln", "log", "sin", "cos", "tan"),
}
"""Words that change the value of the number before them."""
_SHORT_UNITS = set("mgshLlKCFJNWVA")
"""Single letters that are units; any other, behind a number, is a variable."""


def number(text: str) -> Fraction | None:
    r"""The exact value of a plain number or fraction, None for anything else.

    What may dress it: `$`, `\$`, other currencies before it, commas between thousands, `\frac`, units or a percent sign
    behind it (which does not divide by 100), `\text{}`, spaces, a full stop.
    """
    if len(text) > LONGEST:
        return None
    text = re.sub(r"\\(?:text|mathrm|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", text)
    text = _FRACTION.sub(lambda match: f"{match[1] or match[2]}/{match[3] or match[4]}", text)
    text = re.sub(r"\\[$%,;:! ]|\\(?:left|right|circ|quad)\b|[$*]|\^\{?\\circ\}?", _dressing, text).replace("{,}", ",")
    match = _PLAIN.fullmatch(text.strip().rstrip(".").strip())
    if not match or not _is_unit(match["unit"]):
        return None
    try:
        above = Fraction(_digits(match["first"]))
        below = Fraction(_digits(match["below"])) if match["below"] else Fraction(1)
        value = above / below
    except (ValueError, ZeroDivisionError):
        return None
    return -value if match["sign"] in ("-", "−") else value


def _dressing(match: re.Match[str]) -> str:
    return "%" if match[0] == r"\%" else "" if match[0] in ("$", r"\$", "*", r"\,", r"\!") else " "


def _is_unit(text: str) -> bool:
    """Whether what stands behind a number leaves its value alone: `dollars`, `km/h`, `cm^2`; not `x`, nor `million`."""
    if re.match(r"\^|[²³\d]", text.strip()):
        return False  # a power, or another number
    words = re.findall(r"[A-Za-z]+", text)
    return all(
        word in _SHORT_UNITS if len(word) == 1 and word != "a" else word.lower() not in _NO_UNIT for word in words
    )


def _digits(text: str) -> str:
    return text.replace(",", "").replace("−", "-").replace(" ", "")


def close(first: str, second: str, tolerance: float = 0.0) -> bool:
    """Whether two plain numbers differ by at most `tolerance` times the larger of them; exactly equal at 0."""
    a, b = number(first), number(second)
    if a is None or b is None:
        return False
    return abs(a - b) <= Fraction(tolerance) * max(abs(a), abs(b))


def equal(expected: str, answer: str) -> bool:
    """Whether two answers are the same number, expression, tuple, set, equation or, where they are none, text."""
    expected, answer = _bare(expected), _bare(answer)
    if not answer:
        return False
    a, b = number(expected), number(answer)
    if a is not None and b is not None:
        return a == b
    ours, theirs = _tuple(expected), _tuple(answer)
    if ours and theirs:
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if _text(expected) == _text(answer):
        return True
    if any(len(side) > LONGEST or _UNSAFE.search(side) or _wordy(side) for side in (expected, answer)):
        return False
    return _verified(expected, answer)


def _bare(text: str) -> str:
    r"""Without the marks around mathematics, `x = ` before a value, and the full stop behind it."""
    text = text.strip().removesuffix(".").strip()
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            inner = text[len(start) : -len(end)]
            text = inner if start not in inner else text
    return re.sub(r"^[a-zA-Z]\s*=\s*(?=[^=]+$)", "", text.strip())


def _tuple(text: str) -> list[str] | None:
    """Parts of `(a, b, ...)`; None for anything else, sets and half-open intervals included."""
    text = re.sub(r"\\(?:left|right)(?=[()])", "", text)
    if not (text.startswith("(") and text.endswith(")") and "," in text):
        return None
    parts, depth = [""], 0
    for character in text[1:-1]:
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(character, 0)
        if depth < 0:
            return None
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _text(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").casefold().split())


def _wordy(text: str) -> bool:
    """Words, which the parser would take for products of their letters."""
    return bool(re.search(r"(?<!\\)\b[A-Za-z]{4,}\b", re.sub(r"\\[A-Za-z]+", " ", text)))


def _verified(expected: str, answer: str) -> bool:
    from math_verify import parse, verify

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they warn that there is no time limit, each time
    limit = SECONDS if threading.current_thread() is threading.main_thread() else None
    sides = [parse(rf"$\boxed{{{side}}}$", parsing_timeout=limit) for side in (expected, answer)]
    return all(sides) and bool(verify(*sides, timeout_seconds=limit))
