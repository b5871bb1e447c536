"""Command lines in documents and docstrings name scripts that are there, and flags that those scripts have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "conversion", "data_prep", "evaluation", "finetune", "launch", "nano3", "pico", "recipes")
TEXTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "recipes/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
]
COMMAND = re.compile(rf"python ((?:{'|'.join(FOLDERS)})/[\w/]+\.py)([^`\n#|;\"]*)")


@cache
def imported(path: Path) -> frozenset[Path]:
    """Files of the project that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
        elif isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return frozenset(file for file in files if file.is_file())


def flags_of(script: Path) -> set[str]:
    """Flags that a script declares, or what it imports: a command line that several share is in a file of its own."""
    files = {script, *imported(script)}
    files |= {further for file in files if file.stem.endswith("command") for further in imported(file)}
    return {"--help"} | {flag for file in files for flag in re.findall(r'"(--[a-z0-9-]+)"', file.read_text())}


def mistakes(text: str) -> Iterator[str]:
    """What is wrong with the commands in a text."""
    for script, words in COMMAND.findall(re.sub(r"\\{1,2}\n", " ", text)):
        if not (ROOT / script).is_file():
            yield f"{script} is not there"
            continue
        unknown = set(re.findall(r"(?<!\S)(--[a-z0-9-]+)", words)) - flags_of(ROOT / script)
        yield from (f"{script} has no {flag}" for flag in sorted(unknown))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_those_of_the_scripts(path: Path):
    assert not list(mistakes(path.read_text()))


def test_a_wrong_command_is_found():
    text = """
    python conversion/merge_lora.py --adapter A \\
        --out B --nemo
    python conversion/merge.py A B
    """
    assert list(mistakes(text)) == [
        "conversion/merge_lora.py has no --adapter",
        "conversion/merge_lora.py has no --out",
        "conversion/merge.py is not there",
    ]
