"""Every kind solved once more, from the text of the question alone and by other means than the first solver's.

Bits: all examples as one long integer, gates solved for their last operand. Ciphers: search over letters, one word at
a time. Numerals: Python's own `int` and a search over lengths. Measures: every factor tried in whole numbers.
Equations: results looked for among all ways to write them. `answers` gives all answers that the examples allow.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

from data_prep.puzzles.ciphers import VOCABULARY, WORDS
from data_prep.puzzles.puzzle import shown

BYTE = 255


def answers(kind: str, text: str) -> set[str]:
    """All answers to a question that its examples allow. Raises `KeyError` for a kind that has no second solver."""
    return SOLVERS[kind](text)


def _asked(text: str) -> str:
    """The line before the last: what is asked."""
    return text.split("\n")[-2]


def _bits(text: str) -> set[str]:
    pairs, query = shown(text), re.findall(r"[01]{8}", _asked(text))[0]
    # One integer holds the moved words of all examples and of the query: a gate is one operation on it.
    words = [int(left, 2) for left, _ in pairs] + [int(query, 2)]
    wanted = _joined(int(right, 2) for _, right in pairs)
    full, shift = (1 << 8 * len(words)) - 1, 8
    moves = {
        word for k in range(8) for word in (_moved(words, "rotl", k), _moved(words, "shl", k), _moved(words, "shr", k))
    }
    unary = moves | {full ^ move for move in moves}
    found = {word for word in unary if word >> shift == wanted}
    for a, b in itertools.combinations(unary, 2):
        found |= {value for value in (a & b, a | b, a ^ b) if value >> shift == wanted}
    for a, b in itertools.product(moves, repeat=2):
        # choice(a, b, c): where a has a 1 the result is b's, so b is right there; then c must give the rest.
        if (a & b) >> shift != a >> shift & wanted:
            continue
        found |= {value for c in moves if (value := a & b | (full ^ a) & c) >> shift == wanted}
    for a, b, c in itertools.combinations(moves, 3):
        # The majority of three is what two agree on, else the third.
        if ((a ^ b) & c | a & b) >> shift == wanted:
            found.add((a ^ b) & c | a & b)
    return {f"{value & BYTE:08b}" for value in found}


def _joined(words: Iterator[int]) -> int:
    total = 0
    for word in words:
        total = total << 8 | word
    return total


def _moved(words: list[int], how: str, k: int) -> int:
    """All words moved alike, joined; the query is the lowest byte."""
    text = (f"{word:08b}" for word in words)
    if how == "rotl":
        return _joined(int(t[k:] + t[:k], 2) for t in text)
    return _joined(int((t[k:] + "0" * k) if how == "shl" else ("0" * k + t[: 8 - k]), 2) for t in text)


def _cipher(text: str) -> set[str]:
    pairs, asked = shown(text), _asked(text).removeprefix("Decrypt: ")
    if "same number of places" in text:
        shifts = {(ord(c) - ord(p)) % 26 for left, right in pairs for c, p in zip(left, right, strict=True) if c != " "}
        return {"".join(" " if c == " " else chr((ord(c) - 97 - s) % 26 + 97) for c in asked) for s in shifts}
    known = {c: p for left, right in pairs for c, p in zip(left, right, strict=True)}
    vocabulary = WORDS if VOCABULARY in text else None
    return {" ".join(words) for words in _decrypted(asked.split(), known, vocabulary)}


def _decrypted(cipher: list[str], known: dict[str, str], vocabulary: tuple[str, ...] | None) -> Iterator[list[str]]:
    """All plain texts: word by word, each choice adding its letters to the key."""
    if not cipher:
        yield []
        return
    first, *rest = cipher
    candidates = vocabulary or ["".join(known.get(letter, "?") for letter in first)]
    for plain in candidates:
        if len(plain) != len(first) or "?" in plain:
            continue
        key = dict(known)
        if all(key.setdefault(c, p) == p for c, p in zip(first, plain, strict=True)) and _one_to_one(key):
            for tail in _decrypted(rest, key, vocabulary):
                yield [plain, *tail]


def _one_to_one(key: dict[str, str]) -> bool:
    return len(set(key.values())) == len(key)


def _numerals(text: str) -> set[str]:
    pairs = [(int(left), right) for left, right in shown(text)]
    query = int(re.findall(r"\d+", _asked(text))[0])
    found = {_roman(query)} if all(_roman(n) == written for n, written in pairs) else set()
    for base in range(2, 17):
        if base == 10:
            if all(str(n)[::-1] == written for n, written in pairs):
                found.add(str(query)[::-1])
            continue
        for flip in (1, -1):
            if all(_reads(written[::flip], base) == n for n, written in pairs):
                found.add(_digits(query, base)[::flip])
    if all(not re.search(r"[0-9A-Z]", written) for _, written in pairs):
        found |= {answer for base in range(3, 7) if (answer := _in_symbols(pairs, query, base))}
    return found


def _reads(written: str, base: int) -> int | None:
    """The number that a text is in a base; None where it is none, or has a leading zero."""
    try:
        return None if written.startswith("0") else int(written, base)
    except ValueError:
        return None


def _digits(number: int, base: int) -> str:
    """From the lowest digit on, turned round."""
    places = []
    while number:
        places.append("0123456789ABCDEF"[number % base])
        number //= base
    return "".join(reversed(places))


def _roman(number: int) -> str:
    """Digit by digit, from a table of each place."""
    written = ""
    for place, letters in zip((1000, 100, 10, 1), ("M  ", "CDM", "XLC", "IVX"), strict=True):
        one, five, ten = tuple(letters)
        digit = number // place % 10
        written += {4: one + five, 9: one + ten}.get(digit, five * (digit >= 5) + one * (digit % 5))
    return written


def _in_symbols(pairs: list[tuple[int, str]], query: int, base: int) -> str | None:
    """The number in symbols if the examples make a one-to-one table of this base that has its digits."""
    table: set[tuple[str, str]] = set()
    for number, written in pairs:
        digits = _digits(number, base)
        if len(digits) != len(written):
            return None
        table |= set(zip(digits, written, strict=True))
    if not len(table) == len({d for d, _ in table}) == len({s for _, s in table}):
        return None
    symbol = dict(table)
    digits = _digits(query, base)
    return "".join(symbol[digit] for digit in digits) if set(digits) <= set(symbol) else "?"


def _units(text: str) -> set[str]:
    pairs = [(_whole(left), _whole(right)) for left, right in shown(text)]
    query = _whole(re.findall(r"\d+\.\d\d", _asked(text))[-1])
    # y cents = factor/1000 * x cents + offset/10: all in whole numbers of 1/100,000.
    offsets = range(-50, 51) if "fixed length is added" in text else (0,)
    x, y = max(pairs)
    found = set()
    for offset in offsets:
        guess = (1000 * y - 10_000 * offset) // x
        for factor in range(guess - 2, guess + 3):
            if all(_half_up(factor * a + 10_000 * offset, 1000) == b for a, b in pairs):
                found.add(_two(_half_up(factor * query + 10_000 * offset, 1000)))
    return found


def _gravity(text: str) -> set[str]:
    pairs = [(_whole(left), _whole(right)) for left, right in shown(text)]
    query = _whole(re.findall(r"\d+\.\d\d", _asked(text))[-1])
    # d cents = g/100 * (t/100)^2 / 2 * 100, in whole numbers of 1/20,000 cent.
    t, d = max(pairs)
    guess = 20_000 * d // (t * t)
    fits = [g for g in range(guess - 99, guess + 100) if all(_half_up(g * t * t, 20_000) == d for t, d in pairs)]
    return {_two(_half_up(g * query * query, 20_000)) for g in fits}


def _whole(text: str) -> int:
    """`-3.07` -> -307."""
    return int(text.replace(".", ""))


def _half_up(value: int, unit: int) -> int:
    """value / unit to a whole number; halves away from zero, as decimals round."""
    return (2 * abs(value) + unit) // (2 * unit) * (1 if value >= 0 else -1)


def _two(cents: int) -> str:
    sign = "-" if cents < 0 else ""
    return f"{sign}{abs(cents) // 100}.{abs(cents) % 100:02d}"


def _equations(text: str) -> set[str]:
    pairs = shown(text, " = ")
    left = re.findall(r"What is (.+)\?$", _asked(text))[0]
    mine = [(shown_left, result) for shown_left, result in pairs if shown_left[2] == left[2]]
    ways = _templates if "four symbols" in text else lambda line: _computed(line, "backwards" in text)
    fitting: set[str] | None = None
    for line, result in mine:
        names = {name for name, value in ways(line).items() if value == result}
        fitting = names if fitting is None else fitting & names
    return {value for name, value in ways(left).items() if name in (fitting or set())}


def _templates(line: str) -> dict[str, str]:
    """Every choice and order of the four symbols -> what it writes."""
    symbols = dict(zip("abcd", line[:2] + line[3:], strict=True))
    orders = ("".join(order) for size in range(1, 5) for order in itertools.permutations("abcd", size))
    return {order: "".join(symbols[place] for place in order) for order in orders}


def _computed(line: str, flips: bool) -> dict[str, str]:
    """Every operation, with and without the reversals -> what it gives."""
    found = {}
    for flip_in, flip_out in itertools.product((False, True), repeat=2) if flips else [(False, False)]:
        left, right = (text[::-1] if flip_in else text for text in (line[:2], line[3:]))
        values = {
            "sum": str(int(left) + int(right)),
            "gap": str(max(int(left), int(right)) - min(int(left), int(right))),
            "product": str(sum(int(left) for _ in range(int(right)))),
            "left right": str(int(f"{int(left)}{int(right):02d}")),
            "right left": str(int(f"{int(right)}{int(left):02d}")),
        }
        for name, value in values.items():
            found[f"{name} {flip_in} {flip_out}"] = str(int("".join(reversed(value)))) if flip_out else value
    return found


SOLVERS: dict[str, Callable[[str], set[str]]] = {
    "bits": _bits,
    "cipher": _cipher,
    "numerals": _numerals,
    "units": _units,
    "gravity": _gravity,
    "equations": _equations,
}
"""Kind -> its second solver."""
