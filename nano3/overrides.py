"""`key=value` from the command line onto nested dataclasses, typed, with errors that name the key and the remedy.

    apply_overrides(config, ["layout.tp=2", "train.lr=3e-4", "lora.targets=linear_qkv,linear_proj"])

Imports neither torch nor NeMo. The annotations of the dataclass decide how a value is read: `int`, `float`, `bool`
(true or false), `str`, `Path`, `Literal[...]`, `None` in a union (written none), and `list[...]` or `tuple[..., ...]`
of these, written `a,b,c`. `Annotated[..., Range(...)]` says which numbers are allowed (`check_ranges`).
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union

from nano3.cli import UserError
from nano3.ranges import Range
from nano3.synonyms import meant_by

_NONE_WORDS = ("none", "null")
_BOOL_WORDS = {"true": True, "false": False}


def apply_overrides(config: Any, items: list[str]) -> list[str]:
    """Sets the fields of `config`, a dataclass that may hold dataclasses (its groups), from `key=value` items.

    Returns the keys. All items are checked before the first is set, so a `UserError` (no `=`, unknown key, wrong type,
    key given twice) leaves `config` as it was.
    """
    planned: dict[str, tuple[Any, str, Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"cannot read {item!r}: settings are written key=value, for example {_example(config)}")
        if key in planned:
            raise UserError(f"{key} is given twice; keep one of them")
        owner, name = _find(config, key)
        planned[key] = (owner, name, _parse(key, text, typing.get_type_hints(type(owner))[name]))
    for owner, name, value in planned.values():
        setattr(owner, name, value)
    return list(planned)


def nested_keys(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"group.key": value} of nested dictionaries, the keys in their order."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= nested_keys(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def apply_values(config: Any, values: Mapping[str, Any], where: str) -> list[str]:
    """Sets the fields of `config` from values that a file gave, {"group.key": value}; `where` names it in messages.

    Returns the keys. A value has its field's type, or is the text that `apply_overrides` would read. All are checked
    before the first is set; a wrong one raises `UserError`.
    """
    planned = []
    for key, value in values.items():
        try:
            owner, name = _find(config, key)
            hint = typing.get_type_hints(type(owner))[name]
            planned.append((owner, name, _parse(key, _as_text(key, value, hint), hint)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    for owner, name, value in planned:
        setattr(owner, name, value)
    return list(values)


def _as_text(key: str, value: Any, hint: Any) -> str:
    """A value from a file as the command line writes it; `UserError` for one that no field has."""
    if value is None:
        return _NONE_WORDS[0]
    if isinstance(value, bool):
        if hint is str or typing.get_origin(hint) is Literal:
            raise UserError(f"{key}: {value} is a switch here; put the word in quotes")
        return str(value).lower()
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ",".join(_as_text(key, item, str) for item in value)
    if isinstance(value, int | float | str):
        return str(value)
    raise UserError(f"{key}: {value!r} is not {_describe(hint)}")


def check_ranges(config: Any) -> None:
    """Raises `UserError` for a number outside the `Range` that its field declares."""
    for key, (value, allowed) in ranges(config).items():
        if value is not None and not allowed.holds(value):
            why = f": {allowed.why}" if allowed.why else ""
            raise UserError(f"{key}={value} must be {allowed.words()}{why}")


def ranges(config: Any) -> dict[str, tuple[Any, Range]]:
    """{"group.key": (value, range)} of every setting that declares a range."""
    found: dict[str, tuple[Any, Range]] = {}
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found.update({f"{field.name}.{key}": inner for key, inner in ranges(value).items()})
        for part in _extras(hints[field.name]):
            if isinstance(part, Range):
                found[field.name] = (value, part)
    return found


def _extras(hint: Any) -> tuple[Any, ...]:
    """What `Annotated` adds to a type."""
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()


def flatten(config: Any) -> dict[str, Any]:
    """All settings of nested dataclasses as {"group.key": value}, in the order in which they are declared."""
    flat: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            flat.update({f"{field.name}.{key}": inner for key, inner in flatten(value).items()})
        else:
            flat[field.name] = value
    return flat


def _find(config: Any, key: str) -> tuple[Any, str]:
    """The dataclass instance that owns `key`, and the field's name in it. An unknown key raises `UserError`."""
    owner, prefix = config, ""
    *groups, name = key.split(".")
    for group in groups:
        if not is_dataclass(getattr(owner, group, None)):
            raise _unknown(config, key, owner, prefix)
        owner, prefix = getattr(owner, group), f"{prefix}{group}."
    if name not in {field.name for field in fields(owner)}:
        raise _unknown(config, key, owner, prefix)
    if is_dataclass(getattr(owner, name)):
        keys = ", ".join(flatten(getattr(owner, name)))
        raise UserError(f"{key} is a group, not a setting; set {key}.KEY=VALUE with KEY one of {keys}")
    return owner, name


def _unknown(config: Any, key: str, owner: Any, prefix: str) -> UserError:
    """The error for an unknown key: the nearest known key, and what the group that was reached holds."""
    known = list(flatten(config))
    # The last word alone finds `layout.tp` for `tp` and `train.lr` for `lora.lr`, where whole keys are too far apart.
    word = key.rpartition(".")[2]
    near = [name for name in (meant_by(key, known),) if name]
    near = near or get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [name for name in known if name.split(".")[-1] == word]
    near = near or get_close_matches(key, known, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]}?" if near else ""
    where = f"group {prefix[:-1]} has" if prefix else "there are"
    names = [f"{field.name}.*" if is_dataclass(getattr(owner, field.name)) else field.name for field in fields(owner)]
    return UserError(f"unknown key {key}{meant} ({where} {', '.join(prefix + name for name in names)})")


def _parse(key: str, text: str, hint: Any) -> Any:
    """`text` as the type `hint`; `UserError` naming key, value and expected type when it is not one."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _parse_union(key, text, hint)
    if origin in (list, tuple):
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        try:
            return origin(_parse(key, part, typing.get_args(hint)[0]) for part in parts)
        except UserError:
            raise _wrong(key, text, hint) from None
    if origin is Literal:
        if text not in typing.get_args(hint):
            raise _wrong(key, text, hint)
        return text
    if hint in (str, Path):
        return hint(text)
    if hint is bool and text.lower() in _BOOL_WORDS:
        return _BOOL_WORDS[text.lower()]
    if hint is int or hint is float:
        try:
            number = hint(text)
        except ValueError:
            raise _wrong(key, text, hint) from None
        if math.isfinite(number):
            return number
    raise _wrong(key, text, hint)


def _parse_union(key: str, text: str, hint: Any) -> Any:
    """The first member of a union that reads `text`; `str` last, because it reads everything."""
    members = typing.get_args(hint)
    if type(None) in members and text.lower() in _NONE_WORDS:
        return None
    for member in sorted((m for m in members if m is not type(None)), key=lambda m: m is str):
        try:
            return _parse(key, text, member)
        except UserError:
            continue
    raise _wrong(key, text, hint)


def _wrong(key: str, text: str, hint: Any) -> UserError:
    return UserError(f"{key}={text}: {text!r} is not {_describe(hint)}")


def _describe(hint: Any) -> str:
    """A type in a reader's words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in inner)
    if origin in (list, tuple):
        return f"a list a,b,c, each item {_describe(inner[0])}"
    if origin is Literal:
        return "one of " + ", ".join(str(word) for word in inner)
    words = {int: "a whole number", float: "a finite number", bool: "true or false", type(None): "none"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _example(config: Any) -> str:
    key, value = next(iter(flatten(config).items()))
    return f"{key}={value}"
