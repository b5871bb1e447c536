"""BFCL v4, the Berkeley Function Calling Leaderboard: questions, the functions on offer, and the call that is right.

Package bfcl-eval 2026.3.23 (Apache-2.0), folder `bfcl_eval/data`; an evaluation set. `BFCL_v4_CATEGORY.json` is JSON
lines: `id`, `question` (a list of turns, each a list of messages), `function` (a list of definitions with types such
as `dict` and `float`). The right calls stand in `possible_answer/` under the same id: for each parameter the list of
values that count, "" among them where it may be left out; the first is taught, all go along as `accepted`. Single-turn
categories only: 3,641 questions. In the 1,124 of irrelevance no function fits, and the answer says so; the 16 of
live_relevance have no published answer and are dropped with that reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.forms.form import Fields, all_keys, keys, short, text_of, turn
from data_prep.sources.source import Facts, Source
from nano3.cli import UserError
from nano3.rows import Row, open_rows

CATEGORIES = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "irrelevance",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance",
)  # fmt: skip
NO_FUNCTION_FITS = "None of the functions that I have can do this."
"""What the answer says where BFCL wants no call."""
_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
"""BFCL's types -> JSON schema's; Java's and JavaScript's own names become `string`, `any` says nothing."""
_JSON_TYPES = {"object", "array", "string", "integer", "number", "boolean", "null"}


def read(source: Path | str, facts: Facts) -> Iterator[Row]:
    """The questions of one file, or of the single-turn files in a folder, each with its right calls."""
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = [file for category in CATEGORIES if (file := path / f"BFCL_v4_{category}.json").is_file()]
        if not files:
            raise UserError(f"{path} holds no BFCL_v4_simple_python.json; give bfcl_eval/data")
    for file in files:
        category = file.stem.removeprefix("BFCL_v4_")
        if category not in CATEGORIES:
            raise UserError(f"{file} is none of the single-turn categories: {', '.join(CATEGORIES)}")
        answers = _answers(file, category, facts)
        rows = open_rows(file)
        for row in rows:
            calls = answers.get(str(row.fields.get("id"))) if answers is not None else None
            if answers is not None and calls is None:
                raise UserError(f"{row.where}: 'id' is {short(row.fields.get('id'))}, which has no possible answer")
            yield Row({**row.fields, "category": category, "ground_truth": calls}, row.where)
        facts += rows.facts


def _answers(file: Path, category: str, facts: Facts) -> dict[str, Any] | None:
    """Right calls by id; None for the categories that have none."""
    if category.endswith("relevance"):
        return None
    path = file.parent / "possible_answer" / file.name
    answers = {}
    rows = open_rows(path)
    for row in rows:
        if not isinstance(row.fields.get("id"), str) or not isinstance(row.fields.get("ground_truth"), list):
            raise UserError(
                f"{row.where}: 'ground_truth' is {short(row.fields.get('ground_truth'))}; it must be a list"
            )
        answers[row.fields["id"]] = row.fields["ground_truth"]
    facts += rows.facts
    return answers


def chat(fields: Fields) -> dict[str, Any]:
    """One question with its functions, and the first right call, or the sentence that none fits."""
    turns, functions = fields.get("question"), fields.get("function")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], list) or not turns[0]:
        raise UserError(f"'question' is {short(turns)}; it must be a list of one turn, a list of messages")
    if not isinstance(functions, list):
        raise UserError(f"'function' is {short(functions)}; it must be a list of definitions")
    tools = [_tool(number, function) for number, function in enumerate(functions)]
    category, truth = text_of(fields, "category"), fields.get("ground_truth")
    if truth is None:
        answer = turn("assistant", NO_FUNCTION_FITS)
    else:
        calls = [_call(number, call, {tool["function"]["name"] for tool in tools}) for number, call in enumerate(truth)]
        answer = turn("assistant", "", tool_calls=calls)
    return {
        "id": text_of(fields, "id"),
        "subject": category,
        "split": "test",
        "tools": tools,
        "messages": [*turns[0], answer],
        "accepted": truth or [],
    }


def no_answer(fields: Fields) -> str | None:
    """Why a question cannot be taught."""
    return "BFCL publishes no answer for it" if fields.get("category") == "live_relevance" else None


def _tool(number: int, function: Any) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"function[{number}] is {short(function)}; it must be an object with a name")
    return {"type": "function", "function": _as_json_schema(function)}


def _as_json_schema(value: Any) -> Any:
    """The definition with JSON schema's type names wherever `type` names a type."""
    if isinstance(value, list):
        return [_as_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: _as_json_schema(item) for key, item in value.items()}
    kind = value.get("type")
    if isinstance(kind, str):
        kind = _SCHEMA_TYPES.get(kind, kind)
        if kind == "any":
            del changed["type"]
        else:
            changed["type"] = kind if kind in _JSON_TYPES else "string"
    return changed


def _call(number: int, call: Any, names: set[str]) -> dict[str, Any]:
    """The first values that count; a parameter that may be left out is left out."""
    if not isinstance(call, dict) or len(call) != 1 or not isinstance(next(iter(call.values())), dict):
        raise UserError(f"ground_truth[{number}] is {short(call)}; it must be one function with its parameters")
    ((name, parameters),) = call.items()
    if name not in names:
        raise UserError(f"ground_truth[{number}] calls {name!r}, which is none of 'function'")
    arguments = {}
    for parameter, values in parameters.items():
        if not isinstance(values, list):
            raise UserError(f"ground_truth[{number}]: {parameter!r} is {short(values)}; it must be a list of values")
        if values and "" not in values:  # none at all, and "" among them, say that it may be left out
            arguments[parameter] = _first(values[0])
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _first(value: Any) -> Any:
    """A value; in objects, and in lists of them, BFCL lists again what counts for each key."""
    if isinstance(value, dict):
        return {key: _first(inner[0]) for key, inner in value.items() if isinstance(inner, list) and "" not in inner}
    if isinstance(value, list):
        return [_first(item) if isinstance(item, dict) else item for item in value]
    return value


SOURCE = Source(
    "bfcl",
    "BFCL v4, single-turn: tool calls",
    all_keys("id question function category ground_truth"),
    keys(),
    chat,
    terms="Apache-2.0; a leaderboard's evaluation set",
    evaluation_only=True,
    read=read,
    drop=no_answer,
)
