"""Imports go one way, in no circle, and what must answer on a login node stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIDDLE = {"launch", "evaluation", "conversion", "data_prep"}
MAY_IMPORT = {
    "nano3": set(),
    **{package: {"nano3"} for package in sorted(MIDDLE)},
    "evaluation": {"nano3", "conversion", "data_prep"},  # it reads what these two write
    "finetune": MIDDLE | {"nano3"},
    "pico": MIDDLE | {"nano3"},
    "recipes": MIDDLE | {"nano3", "finetune", "pico"},
}
"""Package -> the other packages that it may import."""
LIGHT = (
    "nano3.arch",
    "nano3.cli",
    "nano3.documents",
    "nano3.targets",
    "launch.plan.layout",
    "nano3.overrides",
    "launch.plan.rules",
    "finetune.checks",
    "finetune.command",
)
INSIDE = {
    "nano3": ("cpu", "files", "lora", "checkpoints", "training", "parity"),
    "conversion": ("checkpoint", "fp8", "certificates", "adapters", "files"),
    "launch": ("plan", "slurm", "chain", "files"),
    "evaluation": ("judging", "tasks", "files"),
    "finetune": ("sweep", "files"),
    "data_prep": ("forms", "steps", "sources", "puzzles", "files"),
}
"""Package -> the packages inside it, and its own files: each imports only from what stands before it."""
NEMO_ALLOWED = {"finetune", "recipes", "nano3"}
FILES = [file for package in MAY_IMPORT for file in sorted((ROOT / package).rglob("*.py"))]


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
    package = file.relative_to(ROOT).parts[0]
    others = {name.split(".")[0] for name in imported(file)} & set(MAY_IMPORT) - {package}
    assert others <= MAY_IMPORT[package], f"{file} imports {others - MAY_IMPORT[package]}"


@cache
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
    """What a source imports from our packages, late imports included, that is not there."""
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


def inner(name: str) -> str:
    """Which package inside its package a module `package.a.b` is of, or `files`."""
    package, _, rest = name.partition(".")
    part = rest.split(".")[0]
    return part if part and (ROOT / package / part).is_dir() else "files"


@pytest.mark.parametrize("package", INSIDE)
def test_packages_inside_a_package_stand_in_an_order(package):
    rank, wrong = {name: i for i, name in enumerate(INSIDE[package])}, []
    for file in sorted((ROOT / package).rglob("*.py")):
        here = inner(module_name(file))
        for name in imported(file):
            if name.split(".")[0] == package and rank[inner(name)] > rank[here]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong


def module_name(file: Path) -> str:
    """`nano3.cpu` of `nano3/cpu/__init__.py`, `nano3.arch` of `nano3/arch.py`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_graph() -> dict[str, set[str]]:
    """Module of ours -> the modules of ours that it imports anywhere, in a function or for its types too."""
    files = {module_name(file): file for file in FILES}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        found = graph[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # `from a import b` is a.b where b is a module, and a where it is a name in it.
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if name in files else str(node.module) for name in names}
        graph[module] = found & set(files) - {module}
    return graph


def package_graph(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between packages: `nano3.cpu`, `nano3 files`, `evaluation files`, ..."""
    home = {module: f"{module.split('.')[0]} {inner(module)}" for module in modules}
    graph: dict[str, set[str]] = {package: set() for package in home.values()}
    for module, names in modules.items():
        graph[home[module]] |= {home[name] for name in names} - {home[module]}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_no_module_and_no_package_imports_in_a_circle():
    modules = module_graph()
    assert circles(modules) == []
    assert circles(package_graph(modules)) == []


def test_a_planted_circle_is_found():
    modules = module_graph()
    # nano3.targets imports nano3.arch; the way back closes a circle of two, and a longer one from the lowest package.
    assert "nano3.arch" in modules["nano3.targets"]
    assert circles({**modules, "nano3.arch": {"nano3.targets"}}) == [["nano3.arch", "nano3.targets"]]
    planted = {**modules, "nano3.cpu.standin": {"nano3.context_parallel"}}
    assert any({"nano3 cpu", "nano3 files"} <= set(circle) for circle in circles(package_graph(planted)))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_nemo_is_imported_only_where_it_may_be():
    users = {str(file.relative_to(ROOT)) for file in FILES if any(n.split(".")[0] == "nemo" for n in imported(file))}
    outside = {user for user in users if user.split("/")[0] not in NEMO_ALLOWED}
    assert outside == {"conversion/nemo_io.py"}


def test_light_modules_load_neither_torch_nor_nemo():
    code = f"import sys, {', '.join(LIGHT)}; print(sorted({{'torch', 'nemo', 'megatron'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


READERS = {
    "nano3/documents.py": "the one reader of JSON and YAML",
    "nano3/pickles.py": "the one reader of what torch.save wrote",
    "nano3/messages.py": "text inside a row that was read",
    "nano3/file_digests.py": "what we remember ourselves, in a folder that only you can write to",
    "nano3/parity/processes.py": "what our own ranks wrote into a folder of this process",
    "nano3/token_store.py": "what the tokenizers library wrote a moment ago",
    "nano3/training/supervision.py": "what ranks of one run tell each other",
    "launch/local.py": "the same",
    "data_prep/clean.py": "scratch of this process",
    "data_prep/convert.py": "scratch of this process",
    "data_prep/quality.py": "scratch of this process",
    "data_prep/sources/champ.py": "a data set in one file, larger than a document; fetched by hash",
}
"""File -> why it parses by itself. Everything else goes through `nano3.documents` and `nano3.pickles`."""
PARSES = re.compile(r"\bjson\.loads?\(|\byaml\.(safe_)?load\(|\bpickle\.loads?\(|\btorch\.load\(|\bread_metadata\(\)")


def test_documents_and_pickles_are_read_in_one_place():
    found = {str(file.relative_to(ROOT)) for file in FILES if PARSES.search(file.read_text())}
    assert found == set(READERS)
    assert PARSES.search("pickle.load(file)")
