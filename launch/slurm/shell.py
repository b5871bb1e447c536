"""How text gets into a job's script: quoted by one function, or refused. Imports neither torch nor NeMo.

A script has two readers. sbatch reads the `#SBATCH` lines: there a line break ends an option, and a backslash escapes
even between single quotes (`_get_argument` in Slurm's src/sbatch/opt.c). bash reads the rest.
"""

from __future__ import annotations

import os
import shlex
import unicodedata
from pathlib import Path

from nano3.cli import UserError
from nano3.outputs import fresh_file

SEED = "{seed}"
"""In a path of an array's jobs: the seed of each."""
SEED_VARIABLE = '"$SLURM_ARRAY_TASK_ID"'


def refuse_unwritable(what: str, text: str) -> None:
    """Raises `UserError` for what no quoting carries: line breaks, NUL and other control characters, broken UTF-8."""
    wrong = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if wrong is not None:
        raise UserError(
            f"{what} has {wrong!r} at position {text.index(wrong)}, which cannot stand in a job's script; remove it"
        )


def quote(text: str) -> str:
    """A word for bash that means exactly `text`; nothing in it is expanded or runs. `UserError` if it cannot be."""
    refuse_unwritable(f"{text!r}", text)
    return shlex.quote(text)


def words(arguments: list[str]) -> str:
    """Words for bash; `{seed}` in them is the seed of an array's job, and the only thing that is expanded."""
    return " ".join(
        SEED_VARIABLE.join(quote(part) if part else "" for part in word.split(SEED)) or "''" for word in arguments
    )


def option(name: str, value: str) -> str:
    """An `#SBATCH` line; an empty value is none. `UserError` for a value that sbatch would read as another."""
    if "\\" in value:
        raise UserError(f"{name} is {value!r}; sbatch takes a backslash for an escape: write it without")
    return f"#SBATCH --{name}{f'={quote(value)}' if value else ''}"


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, from its first moment; it replaces an older one whole."""
    with fresh_file(path) as temporary:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
