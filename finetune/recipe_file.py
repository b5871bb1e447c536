"""A recipe is one file with a function: how it is named, kept with the run, and loaded by every rank.

A recipe hands the function itself to `finetune.command.main`, never a name. The function's own file is the recipe, so
a copy of a recipe runs the copy. The launcher keeps that file in OUT/recipe, which all nodes of a run see, and records
its hash. Ranks load the kept file and refuse any other contents. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from nano3.cli import UserError
from nano3.outputs import fresh_file
from nano3.token_store import file_sha256

ROOT = Path(__file__).resolve().parents[1]
"""The project."""
FOLDER = "recipe"
"""In a run's folder: the recipe's file, as it was when the run was started."""
_loading: list[str] = []
"""Recipes that this process is loading. A recipe that starts a run while it is loaded lacks its `__main__` guard."""


@dataclass(frozen=True)
class Recipe:
    """Which function of which file makes a run's configuration."""

    name: str
    """`module:function`, such as `recipes.nemotron_lora:nemotron_3_nano_lora`. `my_recipe.py:function` outside the
    project."""
    file: str
    """Where the file was when the run was started."""
    sha256: dict[str, str] = field(default_factory=dict)
    """The hash of the recipe's file, and of the project's recipes that it imports, by `recipes/NAME.py` or NAME.py."""

    @property
    def function(self) -> str:
        """The function's name in the file."""
        return self.name.rpartition(":")[2]

    @property
    def key(self) -> str:
        """The name of the recipe's file among `sha256`."""
        return _key(Path(self.file))


def recipe_of(function: Callable[..., Any]) -> Recipe:
    """The recipe that `function` is: a plain function at the top level of a file.

    Raises:
        UserError: something that another process could not find by a name, or an import of a file beside the recipe.
    """
    plain = inspect.unwrap(function)
    if not inspect.isfunction(plain):
        raise UserError(f"a recipe is a function written with def; {function!r} is none")
    file, name = Path(plain.__code__.co_filename).resolve(), plain.__qualname__
    if not file.is_file():
        raise UserError(f"the recipe {name} is in no file ({file}); write it into a .py file")
    module = sys.modules.get(function.__module__)
    if getattr(module, name, None) is not function or name not in _functions(file):
        raise UserError(
            f"{file}: {name} is not a function at the top level of the file under its own name, so ranks could not "
            "find it; write it there with def"
        )
    _refuse_neighbours(file)
    sources = [file, *_parents(file)]
    return Recipe(f"{_module(file)}:{name}", str(file), {_key(source): file_sha256(source) for source in sources})


def open_recipe(file: Path) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What the recipe in `file` passes to its command line: its own defaults, and the function itself. Runs the file.

    Raises:
        UserError: no such file, or none whose last line is `run(lambda: main(__doc__, SETTINGS, RECIPE))`.
    """
    file = file.resolve()
    if not file.is_file():
        raise UserError(f"there is no recipe {file}; give a file such as recipes/nemotron_lora.py")
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    named = [[one.id for one in call.args[1:3] if isinstance(one, ast.Name)] for call in calls if _is_main(call)]
    if len(named) != 1 or len(named[0]) != 2:
        raise UserError(
            f"{file} does not end in run(lambda: main(__doc__, settings, my_recipe)); see recipes/README.md"
        )
    module = _opened(_module(file).removesuffix(".py"), file)
    defaults, recipe = (getattr(module, one) for one in named[0])
    return defaults, recipe


def _opened(name: str, file: Path) -> ModuleType:
    """The module of `file`. One that is imported already stays what it is: functions of it are in use elsewhere."""
    module = sys.modules.get(name)
    if module is not None and Path(module.__file__ or "").resolve() == file:
        return module
    return _executed(name, file)


def _executed(name: str, file: Path) -> ModuleType:
    """The module of `file`, made anew. What the recipe defines is found by its module's name."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_main(call: ast.Call) -> bool:
    """Whether this is the call of the shared command line."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return called == "main" and len(call.args) >= 3


def keep(recipe: Recipe, out: Path) -> Path:
    """Copies the recipe's file into the run's folder `out`, where the ranks of all nodes find it; returns the copy.

    Raises:
        UserError: the file is gone, or has changed since the command read it.
    """
    source, kept = Path(recipe.file), out / FOLDER / Path(recipe.file).name
    _require(source, recipe.sha256[recipe.key], "Start the command again")
    with fresh_file(kept) as temporary:
        temporary.write_bytes(source.read_bytes())
    return kept


def load_recipe(recipe: Recipe | None, out: Path) -> Callable[[Any], Any]:
    """The recipe's function, from the file that `keep` left in the run's folder `out`. Runs that file.

    Raises:
        UserError: no recipe, a file with other contents than the run was started with, or one that cannot be imported.
    """
    if recipe is None:
        raise UserError(f"{out}: the run names no recipe; start it with the recipe's own command")
    kept = out / FOLDER / Path(recipe.file).name
    _require(kept, recipe.sha256[recipe.key], "Start the run again with the recipe's own command")
    for name, digest in recipe.sha256.items():
        if name != recipe.key:
            _require(ROOT / name, digest, f"{recipe.key} imports it. Put it back, or start the run again")
    module = recipe.name.rpartition(":")[0]
    with _loads(module):
        try:
            loaded = _executed(module.removesuffix(".py"), kept)
        except ModuleNotFoundError as error:
            raise UserError(
                f"the recipe {recipe.file} cannot be loaded here: {error}. A recipe may import this project and "
                "installed packages"
            ) from None
    return getattr(loaded, recipe.function)


def refuse_while_loading() -> None:
    """Raises `UserError` when a recipe starts a run because a rank loads it."""
    if _loading:
        raise UserError(
            f"the recipe {_loading[-1]} starts a run whenever it is imported; put that line under "
            'if __name__ == "__main__":'
        )


@contextmanager
def _loads(module: str) -> Iterator[None]:
    _loading.append(module)
    try:
        yield
    finally:
        _loading.pop()


def _require(file: Path, digest: str, remedy: str) -> None:
    """Raises `UserError` unless `file` has the contents of this hash."""
    if not file.is_file():
        raise UserError(f"the recipe's file {file} is not there. {remedy}")
    if file_sha256(file) != digest:
        raise UserError(f"{file} has changed since the run was started with it. {remedy}")


def _key(file: Path) -> str:
    """How a recipe's file is called in records: by its place in the project, or by its bare name outside."""
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name


def _module(file: Path) -> str:
    """What stands before the colon of a recipe's name."""
    parts = file.relative_to(ROOT).with_suffix("").parts if file.is_relative_to(ROOT) else ()
    return ".".join(parts) if parts and all(part.isidentifier() for part in parts) else file.name


def _functions(file: Path) -> set[str]:
    """Names of the functions at the top level of a file."""
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def _imports(file: Path) -> set[str]:
    """Dotted names of the modules that a file may import, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _parents(file: Path, known: frozenset[Path] = frozenset()) -> list[Path]:
    """The project's recipes that a recipe imports, and those that they import, sorted."""
    names = {name for name in _imports(file) if name.startswith("recipes.")}
    files = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names}
    new = {path for path in files if path.is_file()} - known - {file}
    for parent in sorted(new):
        new |= set(_parents(parent, known | new | {file}))
    return sorted(new)


def _refuse_neighbours(file: Path) -> None:
    """Raises `UserError` for an import of a file beside the recipe: only Python as it was started here finds it."""
    for name in sorted({name.split(".")[0] for name in _imports(file)}):
        beside = (file.with_name(f"{name}.py"), file.with_name(name) / "__init__.py")
        if file.parent != ROOT and any(path.is_file() for path in beside):
            raise UserError(
                f"{file} imports {name}, which lies beside it, where ranks would not find it. A recipe is one file: "
                "put it into the recipe, or write from recipes import NAME for a file in recipes/"
            )
