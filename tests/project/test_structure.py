"""Imports go one way, and what must answer on a login node stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIDDLE = {"launch", "evaluation", "conversion", "data_prep"}
MAY_IMPORT = {
    "nano3": set(),
    **{room: {"nano3"} for room in MIDDLE},
    "finetune": MIDDLE | {"nano3"},
    "pico": MIDDLE | {"nano3"},
    "recipes": MIDDLE | {"nano3", "finetune", "pico"},
}
"""Room -> the other rooms that it may import."""
LIGHT = (
    "nano3.arch",
    "nano3.cli",
    "nano3.documents",
    "nano3.targets",
    "launch.plan.layout",
    "launch.overrides",
    "launch.plan.rules",
    "finetune.checks",
)
INSIDE = {
    "nano3": ("cpu", "files", "lora", "checkpoints", "training", "parity"),
    "conversion": ("checkpoint", "fp8", "certificates", "adapters", "files"),
}
"""Room -> the rooms inside it, and its own files: the packages import from what stands before them, the files too."""
CPU_TAKES = "nano3.context_parallel"
"""How documents are cut over ranks has one owner, which imports nothing."""
NEMO_ALLOWED = {"finetune", "recipes", "nano3"}
FILES = [file for room in MAY_IMPORT for file in sorted((ROOT / room).rglob("*.py"))]


def imported(file: Path) -> set[str]:
    """Modules that a file imports anywhere, relative imports excluded (there are none)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    room = file.relative_to(ROOT).parts[0]
    rooms = {name.split(".")[0] for name in imported(file)} & set(MAY_IMPORT) - {room}
    assert rooms <= MAY_IMPORT[room], f"{file} imports {rooms - MAY_IMPORT[room]}"


def defined(module: str) -> set[str] | None:
    """Names that one may import from a module of ours, submodules included; none when there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_dir() and not file.exists():
        return None
    names = {inside.stem for inside in path.iterdir()} if path.is_dir() else set()
    for node in ast.walk(ast.parse(file.read_text())) if file.exists() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def missing_imports(source: str) -> set[str]:
    """What a source imports from our rooms, late imports included, that is not there."""
    ours, missing = {*MAY_IMPORT, "tests", "benchmarks"}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ours:
            known = defined(node.module)
            missing |= {f"{node.module}.{a.name}" for a in node.names if known is None or a.name not in known}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.split(".")[0] in ours}
            missing |= {name for name in names if defined(name) is None}
    return missing


def test_every_import_of_ours_is_there():
    """Imports inside functions of scripts that only the full tier starts are found here, in a second."""
    files = [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    assert {str(file): found for file in files if (found := missing_imports(file.read_text()))} == {}
    moved = "def late():\n    from nano3.arch import nothing_here\n    import nano3.nowhere\n"
    assert missing_imports(moved) == {"nano3.arch.nothing_here", "nano3.nowhere"}


def inner(room: str, name: str) -> str:
    """Which inner room a module `room.a.b` is of, or `files`."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in INSIDE[room] else "files"


@pytest.mark.parametrize("room", INSIDE)
def test_rooms_inside_a_room_stand_in_an_order(room):
    rank, wrong = {name: i for i, name in enumerate(INSIDE[room])}, []
    for file in sorted((ROOT / room).rglob("*.py")):
        here = inner(room, ".".join(file.relative_to(ROOT).with_suffix("").parts))
        for name in imported(file):
            if name.startswith(CPU_TAKES):
                continue
            if name.split(".")[0] == room and rank[inner(room, name)] > rank[here]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_nemo_is_imported_only_where_it_may_be():
    users = {str(file.relative_to(ROOT)) for file in FILES if any(n.split(".")[0] == "nemo" for n in imported(file))}
    outside = {user for user in users if user.split("/")[0] not in NEMO_ALLOWED}
    assert outside == {"conversion/nemo_io.py"}


def test_light_modules_load_neither_torch_nor_nemo():
    code = f"import sys, {', '.join(LIGHT)}; print(sorted({{'torch', 'nemo', 'megatron'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
