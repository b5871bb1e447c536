"""Numeral systems: numbers written in a hidden system; one more number to write.

Level 1 is Roman or a base from 2 to 16 with the usual digits; level 2 writes the digits of a base backwards; level 3
has symbols of its own for the digits of a base from 3 to 6, and shows all that the answer needs. Level 0 is what fits a
model of pico's size: the first four systems and small numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

from data_prep.puzzles.puzzle import Pairs, Puzzle, only, question

KIND = "numerals"
RULE = "Numbers are written in another numeral system:"
DIGITS = "0123456789ABCDEF"
BASES = range(2, 17)
SYMBOL_BASES = range(3, 7)
SYMBOLS = "@#%&*+=<>?~^"
EXAMPLES = {0: 4, 1: 4, 2: 4, 3: 7}
LARGEST = {0: 32, 1: 400, 2: 400, 3: 200}
FEW = 4
"""Systems of level 0: Roman and the bases 2, 3 and 4."""
ROMAN = ((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"),
         (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))  # fmt: skip
Writer = Callable[[int], str]


def roman(number: int) -> str:
    """1994 -> MCMXCIV."""
    written = ""
    for value, letters in ROMAN:
        written += letters * (number // value)
        number %= value
    return written


def in_base(number: int, base: int, digits: str = DIGITS) -> str:
    """The digits of a positive number, highest first."""
    written = ""
    while number:
        number, rest = divmod(number, base)
        written = digits[rest] + written
    return written


def _backwards(number: int, base: int) -> str:
    return in_base(number, base)[::-1]


def _family() -> Iterator[tuple[str, Writer]]:
    """The systems of levels 0 to 2 with a name, in the order in which the reasoning tries them."""
    yield "Roman numerals", roman
    for base in BASES:
        if base != 10:
            yield f"base {base}", partial(in_base, base=base)
    for base in BASES:
        yield f"base {base}, read backwards", partial(_backwards, base=base)


def draw(source: random.Random, level: int) -> Puzzle | None:
    """A system, examples and a number to write; None when another system fits the examples and writes it otherwise."""
    numbers = source.sample(range(2, LARGEST[level]), EXAMPLES[level] + 1)
    *examples, query = numbers
    ask = f"Write {query} in that system."
    if level == 3:
        base = source.choice(SYMBOL_BASES)
        symbols = "".join(source.sample(SYMBOLS, base))
        pairs = [(str(n), in_base(n, base, symbols)) for n in examples]
        read = {b: found for b in SYMBOL_BASES if (found := symbols_of(pairs, b)) is not None}
        answers = [_written(query, b, found) for b, found in read.items()]
        answer = only([a or "" for a in answers])
        if not answer:
            return None
        return Puzzle(KIND, level, question(RULE, pairs, ask), _by_symbols(pairs, query, base, read[base]), answer)
    family = list(_family())
    drawn = {0: family[:FEW], 1: family[: -len(BASES)], 2: family[-len(BASES) :]}[level]
    secret = source.choice(drawn)[1]
    pairs = [(str(n), secret(n)) for n in examples]
    fits = [(name, write(query)) for name, write in family if all(write(int(n)) == text for n, text in pairs)]
    answer = only([text for _, text in fits])
    if answer is None:
        return None
    return Puzzle(KIND, level, question(RULE, pairs, ask), _by_trying(pairs, query, family, fits[0][0]), answer)


def symbols_of(pairs: Pairs, base: int) -> dict[int, str] | None:
    """Digit -> symbol as the examples show it in a base; None when they contradict the base or each other."""
    known: dict[int, str] = {}
    for number, text in pairs:
        digits = in_base(int(number), base)
        if len(digits) != len(text):
            return None
        for digit, symbol in zip(digits, text, strict=True):
            if known.setdefault(int(digit), symbol) != symbol:
                return None
    return known if len(set(known.values())) == len(known) else None


def _written(number: int, base: int, known: dict[int, str]) -> str | None:
    """The number in symbols; None where one of its digits has not been shown."""
    digits = [int(digit) for digit in in_base(number, base)]
    return "".join(known[digit] for digit in digits) if set(digits) <= set(known) else None


def _by_trying(pairs: Pairs, query: int, family: list[tuple[str, Writer]], name: str) -> str:
    """The first system that fits, the example that it was checked on, and the number by repeated division."""
    write = dict(family)[name]
    tried = [other for other, _ in family[: [n for n, _ in family].index(name)]]
    lines = [f"Not {', '.join(tried)}: they write {pairs[0][0]} or another example otherwise."] if tried else []
    lines.append(f"{name} fits: " + ", ".join(f"{n} is {write(int(n))}" for n, _ in pairs) + ".")
    return "\n".join([*lines, *_division(query, name), f"{query} is {write(query)}"])


def _division(number: int, name: str) -> list[str]:
    """`38 / 5 = 7 rest 3` and so on for a base, the parts for Roman numerals."""
    if not name.startswith("base"):
        return [" + ".join(f"{value}={letters}" for value, letters in _parts(number))]
    base, lines = int(name.split(",")[0].removeprefix("base ")), []
    while number:
        whole, rest = divmod(number, base)
        lines.append(f"{number} / {base} = {whole} rest {DIGITS[rest]}")
        number = whole
    return lines


def _parts(number: int) -> Iterator[tuple[int, str]]:
    for value, letters in ROMAN:
        while number >= value:
            yield value, letters
            number -= value


def _by_symbols(pairs: Pairs, query: int, base: int, known: dict[int, str]) -> str:
    """The base from the lengths, the digit of every symbol, then the number by repeated division."""
    lines = [f"The lengths fit base {base}: " + ", ".join(f"{n} is {in_base(int(n), base)}" for n, _ in pairs) + "."]
    lines.append("Digits: " + ", ".join(f"{digit}={known[digit]}" for digit in sorted(known)))
    written = "".join(known[int(digit)] for digit in in_base(query, base))
    return "\n".join([*lines, *_division(query, f"base {base}"), f"{query} is {in_base(query, base)}, so {written}"])
