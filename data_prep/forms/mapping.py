"""`--map user="{question} A. {opa}"`: a form that the user writes, one template for each part of a chat row.

`{name}` is a field of the row, `{name.inner}` and `{name[0]}` what stands inside it; `{{` is a brace. Nothing else is
understood, and nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Formatter
from typing import Any

from data_prep.forms.form import Fields, Form, answered, short, turn
from nano3.cli import UserError

PARTS = ("system", "user", "assistant", "reasoning")
"""Parts of the conversation that a map can give."""
FACTS = ("id", "source", "subject", "level", "split", "answer")
"""Facts of the row that it can give as well."""
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def mapped_form(pairs: Sequence[str]) -> Form:
    """The form of `PART=TEMPLATE` pairs. Raises `UserError` for a part or template that there is not."""
    templates: dict[str, list[tuple[str, str | None]]] = {}
    for pair in pairs:
        part, equals, template = pair.partition("=")
        if not equals or part not in PARTS + FACTS:
            raise UserError(f"--map {pair!r} does not begin with one of {', '.join(PARTS + FACTS)} and =")
        if part in templates:
            raise UserError(f"--map gives {part} twice; write one template for it")
        templates[part] = _parsed(pair, template)
    missing = [part for part in ("user", "assistant") if part not in templates]
    if missing:
        raise UserError(f"--map gives no {' and no '.join(missing)}; a conversation needs both")
    names = {_STEP.match(name)[1] for parts in templates.values() for _, name in parts if name}  # type: ignore[index]

    def chat(fields: Fields) -> dict[str, Any]:
        texts = {part: _filled(part, parts, fields) for part, parts in templates.items()}
        empty = [part for part in ("user", "assistant") if not texts[part].strip()]
        if empty:
            raise UserError(f"{empty[0]} is empty as --map fills it; remove the row")
        system = [turn("system", texts["system"])] if texts.get("system") else []
        more = {"reasoning_content": texts["reasoning"].strip()} if "reasoning" in texts else {}
        reply = answered(texts["assistant"], **more)
        facts = {part: texts[part] for part in FACTS if texts.get(part)}
        return facts | {"messages": [*system, turn("user", texts["user"]), reply]}

    return Form("map", "the templates of --map", frozenset(names), (), chat, others="ignore")


def _parsed(pair: str, template: str) -> list[tuple[str, str | None]]:
    """Literal texts, each with the field that follows it."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"--map {pair!r}: {error}; write {{{{ and }}}} for braces that are meant as such") from error
    for _, name, specification, conversion in parsed:
        if name is not None and (specification or conversion or not _STEP.match(name) or _STEP.sub("", name)):
            raise UserError(
                f"--map {pair!r}: {{{name}}} is not a field such as {{question}}, {{data.text}} or {{options[0]}}"
            )
    return [(literal, name) for literal, name, _, _ in parsed]


def _filled(part: str, parts: list[tuple[str, str | None]], fields: Fields) -> str:
    return "".join(literal + (_value(part, name, fields) if name else "") for literal, name in parts)


def _value(part: str, name: str, fields: Fields) -> str:
    """A field as text. Only text and numbers are: a list in a prompt is a mistake. Reasoning may be missing."""
    value: Any = dict(fields)
    for step in _STEP.finditer(name):
        key: Any = step[1] if step[1] is not None else int(step[2])
        inside = isinstance(value, dict) and key in value
        inside = inside or (isinstance(value, list) and isinstance(key, int) and key < len(value))
        if not inside:
            if part in ("reasoning", "system") or part in FACTS:
                return ""
            raise UserError(f"{name!r} is missing or null; the row has {', '.join(map(repr, fields))}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{name!r} is {short(value)}; a template takes text and numbers")
    return str(value)
