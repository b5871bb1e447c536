"""The sentences that explain the settings, read from beside their defaults; `--help-settings` and docs/settings.md.

    python -m finetune.setting_sentences > docs/settings.md

A setting's sentence is the string under its field in the source. Nothing else says what a setting means.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from typing import Any

from finetune.settings import Settings
from nano3.cli import UserError
from nano3.overrides import flatten, ranges

WIDTH = 100
"""Of the lines of `--help-settings`."""


def _of_class(kind: type) -> dict[str, str]:
    """{field: sentence} of a dataclass, its bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[node.target.id] = " ".join(str(following.value.value).split())
    return found


def sentences(settings: Any) -> dict[str, str]:
    """{"group.key": sentence} of every setting, in the order of `nano3.overrides.flatten`."""
    found, own = {}, _of_class(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            found.update({f"{field.name}.{key}": text for key, text in sentences(value).items()})
        else:
            found[field.name] = own[field.name]
    return found


def group_sentence(settings: Settings, group: str) -> str:
    """What a group of settings is about: the first line of its class."""
    return (inspect.getdoc(type(getattr(settings, group))) or "").splitlines()[0]


def groups_of(settings: Settings) -> dict[str, list[str]]:
    """The keys of every group; settings without a group are one of their own."""
    found: dict[str, list[str]] = {}
    for key in flatten(settings):
        found.setdefault(key.partition(".")[0], []).append(key)
    return found


def text_of(value: Any) -> str:
    """A value as the command line writes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def help_text(settings: Settings, group: str = "") -> str:
    """Every setting of a group, or of all, with its default, its range and its sentence.

    Raises:
        UserError: there is no such group.
    """
    groups, explained, allowed = groups_of(settings), sentences(settings), ranges(settings)
    if group and group not in groups:
        raise UserError(f"--help-settings {group}: there is no such group; choose one of {', '.join(groups)}")
    values, lines = flatten(settings), []
    for name in [group] if group else groups:
        if groups[name] != [name]:
            lines += ["", f"{name}: {group_sentence(settings, name)}"]
        for key in groups[name]:
            limits = f"   ({allowed[key][1].words()})" if key in allowed else ""
            lines.append(f"  {key}={text_of(values[key])}{limits}")
            lines += textwrap.wrap(explained[key], WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines).lstrip("\n")


def markdown(settings: Settings) -> str:
    """docs/settings.md."""
    groups, explained, allowed = groups_of(settings), sentences(settings), ranges(settings)
    lines = [
        "# Settings",
        "",
        "Every `key=value` that a recipe takes, with its default. `python -m finetune.setting_sentences` writes this "
        "page",
        "from the sentences beside the defaults. `--help-settings [group]` prints them, with the defaults of your "
        "recipe.",
    ]
    values = flatten(settings)
    for name, keys in groups.items():
        title = [] if keys == [name] else [group_sentence(settings, name), ""]
        lines += ["", f"## {name}", *title, "| setting | default | range | meaning |", "|---|---|---|---|"]
        for key in keys:
            limits = allowed[key][1].words() if key in allowed else ""
            lines.append(
                f"| `{key}` | `{text_of(values[key])}` | {limits} | {explained[key]} |".replace("| `` |", "| |")
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(Settings()), end="")
