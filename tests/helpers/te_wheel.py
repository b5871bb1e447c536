"""Reads signatures out of the real transformer-engine wheel, as text: importing it needs CUDA."""

from __future__ import annotations

import ast
import inspect
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

Parameter = tuple[str, str, str]  # name, kind, default as repr or source text, '' for none


class Found(NamedTuple):
    """A definition and the module that holds it; `node` is None for a module."""

    module: str
    node: ast.AST | None


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, with those inside if, try and with."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from statements(getattr(statement, field, []))


class Wheel:
    """The Python sources of one wheel."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            self.sources = {n: archive.read(n).decode() for n in archive.namelist() if n.endswith(".py")}
        self.tree = cache(self._tree)

    def path(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((p for p in (f"{base}.py", f"{base}/__init__.py") if p in self.sources), None)

    def _tree(self, module: str) -> ast.Module | None:
        path = self.path(module)
        return ast.parse(self.sources[path]) if path else None

    def find(self, module: str, name: str) -> Found | None:
        """Where `from module import name` leads, through re-exports; None if the wheel has no such name."""
        tree = self.tree(module)
        if tree is None:
            return None
        for statement in statements(tree.body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == name:
                return Found(module, statement)
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    return Found(module, statement)
            if isinstance(statement, ast.ImportFrom):
                found = self._imported(module, statement, name)
                if found:
                    return found
        return Found(f"{module}.{name}", None) if self.path(f"{module}.{name}") else None

    def _imported(self, module: str, statement: ast.ImportFrom, name: str) -> Found | None:
        source = statement.module or ""
        if statement.level:
            is_package = (self.path(module) or "").endswith("__init__.py")
            parents = module.split(".")
            kept = parents[: len(parents) - statement.level + is_package]
            source = ".".join([*kept, *([source] if source else [])])
        for alias in statement.names:
            target = name if alias.name == "*" else alias.name
            itself = (source, target) == (module, name)  # `from package import submodule`, within the package
            if (alias.name == "*" or (alias.asname or alias.name) == name) and not itself:
                found = self.find(source, target)
                if found:
                    return found
        return None

    def method(self, found: Found, name: str) -> tuple[Found, ast.FunctionDef] | None:
        """A method and the class that defines it, looking in the wheel's base classes too."""
        assert isinstance(found.node, ast.ClassDef)
        for statement in found.node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                return found, statement
        for base in self.bases(found):
            inherited = self.method(base, name)
            if inherited:
                return inherited
        return None

    def bases(self, found: Found) -> list[Found]:
        assert isinstance(found.node, ast.ClassDef)
        bases = [self.find(found.module, b.id) for b in found.node.bases if isinstance(b, ast.Name)]
        return [b for b in bases if b and isinstance(b.node, ast.ClassDef)]

    def signature(self, found: Found, method: str = "") -> list[Parameter] | None:
        """Parameters of a function, or of a class's method without self; None where the wheel has no such method.

        A constructor's `**kwargs` are followed into the base class, as they are passed on to it.
        """
        if isinstance(found.node, ast.FunctionDef):
            return parameters(found.node)
        if not isinstance(found.node, ast.ClassDef):
            return None
        defined = self.method(found, method or "__init__")  # a function here may be a class there
        if defined is None:
            return None
        owner, node = defined
        own = parameters(node)[1:]
        if method == "__init__" and own and own[-1][1] == "VAR_KEYWORD":
            for base in self.bases(owner):
                more = self.signature(base, "__init__") or []
                names = {p[0] for p in own}
                own = own[:-1] + [(n, "KEYWORD_ONLY", d) for n, _, d in more if n not in names]
        return own


def default(node: ast.expr | None) -> str:
    if node is None:
        return ""
    try:
        return repr(ast.literal_eval(node))
    except ValueError:
        return ast.unparse(node)


def parameters(function: ast.FunctionDef) -> list[Parameter]:
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
    found = [
        (p.arg, "POSITIONAL_ONLY" if p in a.posonlyargs else "POSITIONAL_OR_KEYWORD", default(d))
        for p, d in zip(positional, defaults, strict=True)
    ]
    if a.vararg:
        found.append((a.vararg.arg, "VAR_POSITIONAL", ""))
    found += [(p.arg, "KEYWORD_ONLY", default(d)) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    if a.kwarg:
        found.append((a.kwarg.arg, "VAR_KEYWORD", ""))
    return found


def as_signature(found: list[Parameter]) -> inspect.Signature:
    """For `bind`: only whether a parameter has a default matters there."""
    return inspect.Signature(
        [
            inspect.Parameter(n, getattr(inspect.Parameter, kind), default=d if d else inspect.Parameter.empty)
            for n, kind, d in found
        ]
    )
