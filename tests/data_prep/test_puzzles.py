"""Puzzles: two solvers agree on every one, a third finds no second answer, and the reasoning says what it does."""

from __future__ import annotations

import itertools
import json
import re
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from data_prep.generate import fresh_rows
from data_prep.puzzles import bits, ciphers, equations, measures, numerals
from data_prep.puzzles.kinds import KINDS, checked, puzzle_rows
from data_prep.puzzles.puzzle import LEVELS, shown
from data_prep.puzzles.second_solver import answers
from nano3.cli import UserError

SEED = 5


def asked(text: str) -> str:
    return text.split("\n")[-2]


def third_bits(text: str) -> set[str]:
    """By columns: bit j of every example as one number, and for each rule only columns are compared."""
    pairs, query = shown(text), re.findall("[01]{8}", asked(text))[0]
    rows, wanted = [left for left, _ in pairs] + [query], [right for _, right in pairs]
    n = len(pairs)
    columns = [sum(int(row[j]) << i for i, row in enumerate(rows)) for j in range(8)]
    target = [sum(int(row[j]) << i for i, row in enumerate(wanted)) for j in range(8)]
    every, seen = (1 << n + 1) - 1, (1 << n) - 1
    rotations = [[columns[(j + k) % 8] for j in range(8)] for k in range(8)]
    left = [[columns[j + k] if j + k < 8 else 0 for j in range(8)] for k in range(1, 8)]
    right = [[columns[j - k] if j >= k else 0 for j in range(8)] for k in range(1, 8)]
    plain = rotations + left + right
    both = plain + [[every ^ c for c in word] for word in plain]
    gates = [
        (itertools.combinations(both, 1), lambda a: a),
        (itertools.combinations(both, 2), lambda a, b: a & b),
        (itertools.combinations(both, 2), lambda a, b: a | b),
        (itertools.combinations(both, 2), lambda a, b: a ^ b),
        (itertools.combinations(plain, 3), lambda a, b, c: a & b | b & c | a & c),
        (itertools.product(plain, repeat=3), lambda a, b, c: a & b | (every ^ a) & c),
    ]
    found = set()
    for operands, gate in gates:
        for words in operands:
            if all(gate(*(w[j] for w in words)) & seen == target[j] for j in range(8)):
                found.add("".join(str(gate(*(w[j] for w in words)) >> n & 1) for j in range(8)))
    return found


def third_cipher(text: str) -> set[str]:
    """Every combination of vocabulary words of the right lengths that keeps the letters one to one."""
    pairs, words = shown(text), asked(text).removeprefix("Decrypt: ").split()
    if "number of places" in text:
        moved = [
            {c: chr((ord(c) - 97 + k) % 26 + 97) for c in map(chr, range(97, 123))} | {" ": " "} for k in range(26)
        ]
        keys = [key for key in moved if all("".join(map(key.get, left)) == right for left, right in pairs)]
        return {"".join(key[c] for c in " ".join(words)) for key in keys}
    lists = [[plain for plain in ciphers.WORDS if len(plain) == len(word)] for word in words]
    known = {item for left, right in pairs for item in zip(left, right, strict=True)}
    # A word alone must keep the letters one to one with what is known, before words are combined.
    lists = [
        [p for p in plains if one_to_one(known | set(zip(word, p, strict=True)))]
        for word, plains in zip(words, lists, strict=True)
    ]
    found = set()
    for choice in itertools.product(*lists):
        if one_to_one(known | {item for w, p in zip(words, choice, strict=True) for item in zip(w, p, strict=True)}):
            found.add(" ".join(choice))
    return found


def one_to_one(pairs: set[tuple[str, str]]) -> bool:
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def third_numerals(text: str) -> set[str]:
    """Tables of all numbers up to 400 in every system; for symbols, every assignment of digits to them."""
    pairs, query = [(int(a), b) for a, b in shown(text)], int(re.findall(r"\d+", asked(text))[0])
    tables = [[np.base_repr(n, base) for n in range(400)] for base in range(2, 17) if base != 10]
    tables += [[np.base_repr(n, base)[::-1] for n in range(400)] for base in range(2, 17)]
    tables.append([numerals.roman(n) for n in range(400)])
    found = {table[query] for table in tables if all(table[n] == b for n, b in pairs)}
    symbols = sorted({symbol for _, b in pairs for symbol in b})
    if set(symbols) <= set(numerals.SYMBOLS):
        for base in numerals.SYMBOL_BASES:
            for digits in itertools.permutations("012345"[:base], len(symbols)) if len(symbols) <= base else ():
                turn = str.maketrans(dict(zip(symbols, digits, strict=True)))
                if all(np.base_repr(n, base) == b.translate(turn) for n, b in pairs):
                    back = dict(zip(digits, symbols, strict=True))
                    found.add("".join(back.get(d, "?") for d in np.base_repr(query, base)))
    return found


def third_measure(text: str, law: measures.Law) -> set[str]:
    """Every factor up to 50, every added length, all at once in whole numbers."""
    offsets = np.arange(-50, 51) if measures.OFFSET in text else np.zeros(1, int)
    scale = int(1 / law.step)
    factors, query = np.arange(1, 50 * scale), Fraction(re.findall(r"\d+\.\d\d", asked(text))[-1])

    def cents(x: Fraction) -> np.ndarray:
        """(offsets, factors) results in cents, half up."""
        over = 20_000 * scale
        value = factors[None] * int(law.feature(x) * over) * 100 // scale + offsets[:, None] * (over // 10) * 100
        return (2 * value + over) // (2 * over)

    fits = np.ones((len(offsets), len(factors)), bool)
    for x, y in shown(text):
        fits &= cents(Fraction(x)) == round(Fraction(y) * 100)
    return {str(measures.rounded(Fraction(int(value), 100))) for value in cents(query)[fits]}


def third_equations(text: str) -> set[str]:
    """Level 3: positions by `str.find`. Levels 1 and 2: reversals in arithmetic."""
    pairs, left = shown(text, " = "), asked(text)[8:-1]
    mine = [(a, b) for a, b in pairs if a[2] == left[2]]
    if "four symbols" in text:
        a, b = mine[0]
        places = [(a[:2] + a[3:]).find(symbol) for symbol in b]
        assert all("".join((a[:2] + a[3:])[p] for p in places) == b for a, b in mine)
        return {"".join((left[:2] + left[3:])[p] for p in places)}

    def turned(n: int) -> int:
        return n % 10 * 10 + n // 10

    found = set()
    operations = (np.add, np.multiply, lambda a, b: abs(a - b), lambda a, b: 100 * a + b, lambda a, b: a + 100 * b)
    for operation, before, after in itertools.product(operations, (0, 1), (0, 1)):
        if (before or after) and "backwards" not in text:
            continue

        def apply(line: str, operation=operation, before=before, after=after) -> str:
            a, b = (turned(int(t)) if before else int(t) for t in (line[:2], line[3:]))
            value = int(operation(a, b))
            return str(int(str(value)[::-1]) if after else value)

        if all(apply(a) == b for a, b in mine):
            found.add(apply(left))
    return found


THIRD = {
    "bits": third_bits,
    "cipher": third_cipher,
    "numerals": third_numerals,
    "units": lambda text: third_measure(text, measures.UNITS),
    "gravity": lambda text: third_measure(text, measures.GRAVITY),
    "equations": third_equations,
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_solvers_find_the_same_single_answer(kind):
    for level in range(KINDS[kind].least, LEVELS[-1] + 1):
        for number in range(12):
            puzzle = checked(kind, SEED, number, level)
            assert THIRD[kind](puzzle.question) == {puzzle.answer}, puzzle.question


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_two_solvers_agree_on_ten_thousand_puzzles(kind):
    rows = list(puzzle_rows(kind, 10_000, SEED + 1))  # raises at the first disagreement
    questions = {row["messages"][0]["content"] for row in rows}
    assert len(rows) == 10_000
    assert len(questions) > 9_900


@pytest.mark.parametrize("kind", KINDS)
def test_a_puzzle_is_a_function_of_its_seed(kind):
    first, again, other = (list(puzzle_rows(kind, 6, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [row["level"] for row in first] == [1, 2, 3, 1, 2, 3]
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize("kind", KINDS)
def test_the_reasoning_ends_with_the_answer(kind):
    """Its last line is what the box repeats; for ciphers, the last line is the last word."""
    for row in puzzle_rows(kind, 30, SEED):
        message = row["messages"][1]
        answer = row["answer"]
        assert message["content"] == f"\\boxed{{{answer}}}"
        last = message["reasoning_content"].split("\n")[-1]
        assert last.endswith(answer.split()[-1]), (last, answer)


def test_bits_by_hand():
    """rotl1 of 10000001 is 00000011; choice takes the first word's bits where the chooser has a 1."""
    found, table = bits.rules()
    by_name = {str(rule): i for i, rule in enumerate(found)}
    assert len(found) == 44 + 3 * 946 + 1540 + 10648 == table.shape[0]
    assert table[by_name["rotl1"], 0b10000001] == 0b00000011
    assert table[by_name["shr2"], 0b10000001] == 0b00100000
    assert table[by_name["xor(x, not x)"], 7] == 255
    assert table[by_name["choice(x, rotl1, shr1)"], 0b11001100] == (0b11001100 & 0b10011001 | 0b00110011 & 0b01100110)


def test_measures_by_hand():
    """1.697 * 21.24 + 2.6 = 38.64428; a tie rounds up."""
    pairs = [("9.62", "18.93"), ("40.01", "70.50"), ("29.79", "53.15"), ("10.22", "19.94"), ("44.19", "77.59")]
    assert measures.fitting(measures.UNITS, pairs, 3) == [(Fraction(1697, 1000), Fraction(26, 10))]
    assert str(measures.rounded(Fraction(125, 1000))) == "0.13"


def test_an_open_puzzle_is_not_kept():
    """One example of `join` and `join the other way` that agree leaves two answers; the second solver says both."""
    text = "\n".join([equations.RULE[1], "33+33 = 3333", "What is 12+34?", "Put the final answer in \\boxed{}."])
    assert answers("equations", text) == {"1234", "3412"}


def test_a_wrong_first_solver_is_noticed(monkeypatch):
    """With an operation broken in the generator only, the two solvers disagree."""
    monkeypatch.setitem(equations.OPERATIONS, "add", lambda a, b: a + b + 1)
    with pytest.raises(RuntimeError, match="by the other way"):
        list(puzzle_rows("equations", 40, SEED, 1))


def test_generate_writes_puzzles_and_refuses_other_parameters():
    rows = list(fresh_rows("challenge/units", 5, 1, level=2))
    assert [row["level"] for row in rows] == [2] * 5
    with pytest.raises(UserError, match="puzzles have no parameter 'depth'"):
        list(fresh_rows("challenge/units", 5, 1, depth=2))


def test_unknown_kinds_and_levels_are_refused():
    with pytest.raises(UserError, match="no puzzle kind 'chess'; there are bits"):
        next(puzzle_rows("chess", 1, 1))
    with pytest.raises(UserError, match="level=4 is none of bits's: 1, 2, 3"):
        next(puzzle_rows("bits", 1, 1, 4))
    with pytest.raises(UserError, match="level=0 is none of bits's: 1, 2, 3"):
        next(puzzle_rows("bits", 1, 1, 0))


def test_numerals_have_a_level_for_a_model_of_picos_size():
    """Numbers below 32 in Roman numerals and in the bases 2, 3 and 4, whatever else a number could be read as."""
    rows = list(puzzle_rows("numerals", 60, SEED, 0))
    assert {row["level"] for row in rows} == {0}
    for row in rows:
        pairs = shown(row["messages"][0]["content"])
        assert max(int(number) for number, _ in pairs) < 32
        systems = {"Roman": numerals.roman} | {str(b): partial(numerals.in_base, base=b) for b in (2, 3, 4)}
        assert any(all(write(int(number)) == text for number, text in pairs) for write in systems.values())
