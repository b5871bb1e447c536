"""Text encryption: words whose letters were replaced, with their plain text beside; one more line to decrypt.

Level 1 shifts the alphabet, level 2 permutes it and shows every letter that is asked for, level 3 leaves one or two
letters open that only one word of the listed vocabulary can fill.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from string import ascii_lowercase

from data_prep.puzzles.puzzle import Puzzle, question

KIND = "cipher"
WORDS = tuple(
    """
    amber anchor autumn basket beacon bridge candle canyon castle cellar circle clover copper corner desert
    dragon engine falcon feather forest garden glacier harbor hollow island jacket jungle kettle ladder lantern
    legend marble meadow mirror morning mountain needle ocean orchard paper pebble pencil pepper planet pocket
    prairie quartz quiver rabbit ribbon river saddle season shadow silver spider spring summer temple thunder
    timber tower travel tunnel valley velvet vessel village violin walnut whisper willow window winter wizard
    yellow zephyr
    """.split()  # noqa: SIM905  # a list of eighty quoted words reads worse
)
"""The plain words, and the vocabulary that level 3 lists."""
RULE = {
    1: "Every letter was moved by the same number of places through the alphabet. Cipher text, then plain text:",
    2: "Every letter was replaced by another, always the same one. Cipher text, then plain text:",
}
RULE[3] = RULE[2]
VOCABULARY = "All plain words are among these: "
SHOWN = {1: (2, 3), 2: (5, 3), 3: (5, 3)}
"""By level: lines of the examples, and words of a line."""
ASKED_WORDS = 3
OPEN_LETTERS = {1: range(27), 2: range(1), 3: range(1, 3)}
"""By level: how many letters of the asked line may be missing from the examples."""


def draw(source: random.Random, level: int) -> Puzzle | None:
    """A key, examples and a line to decrypt; None when the open letters can be filled in two ways, or are not few."""
    key = _key(source, level)
    lines, width = SHOWN[level]
    drawn = source.sample(WORDS, lines * width + ASKED_WORDS)
    plain = [" ".join(drawn[i * width : (i + 1) * width]) for i in range(lines)]
    asked = " ".join(drawn[lines * width :])
    pairs = [(line.translate(key), line) for line in plain]
    known = {cipher: letter for left, right in pairs for cipher, letter in zip(left, right, strict=True)}
    cipher = asked.translate(key)
    missing = set(cipher) - set(known)
    if len(missing) not in OPEN_LETTERS[level]:
        return None
    if level == 3 and any(len(fitting(word, known)) != 1 for word in cipher.split()):
        return None
    rule = RULE[level] + ("" if level < 3 else f"\n{VOCABULARY}{', '.join(sorted(WORDS))}.")
    reasons = _by_shift(cipher, pairs) if level == 1 else _by_letters(cipher, known)
    return Puzzle(KIND, level, question(rule, pairs, f"Decrypt: {cipher}"), reasons, asked)


def _key(source: random.Random, level: int) -> dict[int, int]:
    """Plain letter -> cipher letter, as `str.translate` takes it."""
    if level == 1:
        places = source.randrange(1, 26)
        return str.maketrans(ascii_lowercase, ascii_lowercase[places:] + ascii_lowercase[:places])
    return str.maketrans(ascii_lowercase, "".join(source.sample(ascii_lowercase, 26)))


def fitting(word: str, known: dict[str, str]) -> list[str]:
    """Vocabulary words that a cipher word can be: equal where letters are known, each open letter a fresh one."""
    free = "".join(letter for letter in ascii_lowercase if letter not in known.values())
    pattern, groups = "", dict[str, str]()
    for letter in word:
        if letter in known:
            pattern += known[letter]
        elif letter in groups:
            pattern += f"(?P={groups[letter]})"
        else:
            groups[letter] = f"g{len(groups)}"
            pattern += f"(?P<{groups[letter]}>[{free or '-'}])"
    matches = (re.fullmatch(pattern, plain) for plain in WORDS)
    return [match.string for match in matches if match and len(set(match.groups())) == len(match.groups())]


def _by_shift(cipher: str, pairs: list[tuple[str, str]]) -> str:
    """The shift from the first letter, checked on every line, then the asked line letter by letter."""
    (left, right), *_ = pairs
    places = (ord(left[0]) - ord(right[0])) % 26
    lines = [f"{left[0]} stands for {right[0]}: {places} places. The other letters agree."]
    back = str.maketrans(ascii_lowercase, ascii_lowercase[-places:] + ascii_lowercase[:-places])
    return "\n".join([*lines, *_spelled(cipher, lambda letter: letter.translate(back))])


def _by_letters(cipher: str, known: dict[str, str]) -> str:
    """The table of the letters that are needed, the words that fill open letters, then the asked line."""
    needed = sorted(set(cipher.replace(" ", "")) & set(known))
    lines = ["Letters from the examples: " + ", ".join(f"{letter}={known[letter]}" for letter in needed)]
    table = dict(known)
    for word in cipher.split():
        if set(word) - set(table):
            partly = "".join(table.get(letter, "?") for letter in word)
            (plain,) = fitting(word, table)
            lines.append(f"{word} is {partly}: of the vocabulary only {plain} fits")
            table |= dict(zip(word, plain, strict=True))
    return "\n".join([*lines, *_spelled(cipher, lambda letter: table[letter])])


def _spelled(cipher: str, letter_of: Callable[[str], str]) -> list[str]:
    return [f"{word}: " + "".join(letter_of(letter) for letter in word) for word in cipher.split()]
