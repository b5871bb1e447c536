"""Structured input from disk or network: bounded, held to a declared schema, and refused in one line otherwise.

A format declares its fields once, next to its owner, as a `TypedDict` with the types and ranges of this module:

    class Packs(TypedDict):
        seq_length: Positive
        store_sha256: Sha256
        note: NotRequired[str]

    facts = read_json(folder / "packs.json", Packs, remedy="pack the store again")

What comes back is the parsed document itself, fields that the schema does not name included: a schema says what must
hold, not all that may be there. One that is `closed` names all: for files that people write. Types are strict: "5",
5.0 and true are no integers. A range refuses NaN and infinity.
Python's JSON takes the words NaN and Infinity, and so does this: a field refuses them by its range.

No document is larger than `MAX_BYTES` or nested deeper than `MAX_DEPTH`, no object says a key twice, and every string
is valid Unicode. Light: pydantic is imported when the first document is read.
"""

from __future__ import annotations

import functools
import json
import math
import os
import reprlib
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from annotated_types import Ge, Gt, Le, MaxLen, Predicate

from nano3.errors import UserError

try:
    import jiter

    _fast_json: Callable[..., Any] | None = jiter.from_json
except ModuleNotFoundError:  # it is compiled for one Python, so a container may lack it: the same, slower
    _fast_json = None

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

MAX_BYTES = 16 << 20
"""Largest document, and longest line of JSON lines. The index of 120B parameters in 40,000 tensors has 4 MiB; Python's
objects for 16 MiB of the worst JSON take some 500 MB."""

MAX_YAML = 256 << 10
"""Largest YAML document: settings that people write, and PyYAML reads 100 KiB a second."""

MAX_DEPTH = 64
"""Deepest nesting. Our own formats need 6; what reads recursively later must not meet more."""

MAX_ITEMS = 2_000_000
"""Most values of a level of nesting: a YAML alias can name the same list a billion times."""

LARGEST = 1 << 53
"""Largest whole number that every reader of JSON keeps exactly (IEEE 754 double)."""


def is_sha256(text: str) -> bool:
    """64 lower-case hexadecimal digits."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def is_inner_path(text: str) -> bool:
    """A path to a file inside the folder: relative, no way out."""
    return len(text) <= 1000 and all(is_file_name(part) for part in text.split("/"))


def is_file_name(text: str) -> bool:
    """The name of a file in the same folder: no path, no way out of it, nothing that a terminal would act on."""
    return 0 < len(text) <= 255 and text not in (".", "..") and "/" not in text and text.isprintable()


def is_path(text: str) -> bool:
    """What a file system may be asked for: a path of at most 4,095 bytes, its names of at most 255, without NUL."""
    names = text.encode().split(b"/")
    return sum(map(len, names)) + len(names) <= 4096 and max(map(len, names)) <= 255 and "\0" not in text


Count = Annotated[int, Ge(0), Le(LARGEST)]
Positive = Annotated[int, Ge(1), Le(LARGEST)]
Finite = Annotated[float, Ge(-1e300), Le(1e300)]
NotNegative = Annotated[float, Ge(0), Le(1e300)]
AboveZero = Annotated[float, Gt(0), Le(1e300)]
Text = Annotated[str, MaxLen(100_000)]
Name = Annotated[str, MaxLen(1000)]
Sha256 = Annotated[str, Predicate(is_sha256)]
FileName = Annotated[str, Predicate(is_file_name)]
InnerPath = Annotated[str, Predicate(is_inner_path)]
AnyPath = Annotated[str, Predicate(is_path)]
Shape = Annotated[list[Count], MaxLen(16)]

_SAYS = {
    is_sha256: "a SHA-256 in 64 hexadecimal digits",
    is_file_name: "the name of a file in the same folder",
    is_inner_path: "the path of a file inside the folder",
    is_path: "a path that a file system can hold",
}
"""What a predicate asks for, in words."""


def closed(schema: type[T]) -> type[T]:
    """A `TypedDict` whose document may hold nothing else: a key that is spelled wrong would be a key left out."""
    schema.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]  # as pydantic reads it
    return schema


def read_bytes(path: Path, remedy: str, limit: int = MAX_BYTES) -> bytes:
    """A whole file of at most `limit` bytes. Raises `UserError` for a larger one, none, or anything but a plain file
    (a pipe would never end)."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); {remedy}") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"{path} is no plain file; {remedy}")
    with os.fdopen(file, "rb") as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} is larger than {limit >> 10:,} KiB, which no such file is; {remedy}")
    return data


def read_json(path: Path, schema: type[T], remedy: str = "restore the file", limit: int = MAX_BYTES) -> T:
    """The JSON document in a file, held to `schema`.

    Args:
        path: the file; errors name it.
        schema: a `TypedDict`, or any type that pydantic knows; `dict` for an object whose fields somebody else checks.
        remedy: what the user can do about a file that is not as it must be, as the end of a sentence.
        limit: bytes at most; more than `MAX_BYTES` only where a user's own files are that large.

    Raises:
        UserError: no such file, or one that is too large, too deep, no JSON, or not what `schema` says: one line with
            file, field, value and remedy.
    """
    value = _load_json(read_bytes(path, remedy, limit), str(path), remedy, limit)
    return check(value, schema, str(path), remedy)


def parse_json(text: bytes | str, schema: type[T], where: str, remedy: str = "restore the file") -> T:
    """The same for JSON that is already in memory; `where` is how errors call it."""
    return check(_load_json(text, where, remedy), schema, where, remedy)


def parse_json_line(text: bytes | str, where: str) -> dict[str, Any]:
    """One row of JSON lines: an object. `where` is its file and line."""
    row = _load_json(text, where, "every line must be one JSON object")
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, not {_kind(row)}")
    return row


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of JSON lines with `file:line` of each, in constant memory; blank lines are skipped."""
    with open(path, "rb") as file:
        for number, line in numbered_lines(file, str(path)):
            if line.strip():
                yield f"{path}:{number}", parse_json_line(line, f"{path}:{number}")


def numbered_lines(file: Any, name: str) -> Iterator[tuple[int, bytes]]:
    """Lines of an open file of bytes, counted from 1, of at most `MAX_BYTES` each: a file without line ends would fill
    the memory. `name` is how errors call the file."""
    number = 0
    while line := file.readline(MAX_BYTES + 1):
        number += 1
        if len(line) > MAX_BYTES:
            raise UserError(f"{name}:{number}: a line of more than {MAX_BYTES >> 20} MiB; write one row a line")
        yield number, line


def read_yaml(path: Path, schema: type[T], remedy: str = "correct the file") -> T:
    """The YAML document in a file, held to `schema`; errors as in `read_json`. An empty file is an empty mapping."""
    import yaml

    where, data = str(path), read_bytes(path, remedy, MAX_YAML)
    try:
        value = yaml.load(data.decode(), _yaml_loader())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); {remedy}") from None
    except RecursionError:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH}; {remedy}") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Not only YAMLError: PyYAML fails in many ways at a tag such as !!timestamp before something else.
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: not valid YAML ({reason}); {remedy}") from None
    _check_nesting(value, where, remedy)
    return check({} if value is None else value, schema, where, remedy)


def check(value: Any, schema: type[T], where: str, remedy: str) -> T:
    """`value` itself when it is what `schema` says; else `UserError` for the first field that is not."""
    from pydantic import ValidationError

    try:
        _adapter(cast(Hashable, schema)).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(_explain(error.errors(include_url=False)[0], where, remedy)) from None
    return value


def as_json(value: Any) -> Any:
    """A value as it would come back from JSON: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))


def shown(value: Any) -> str:
    """A value of a file as an error may print it: short, on one line, control characters escaped."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more than 4,300 digits, which Python does not print
        return "a value that is too long to print"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


@functools.cache
def _adapter(schema: Hashable) -> TypeAdapter:
    from pydantic import TypeAdapter

    return TypeAdapter(cast(Any, schema))


def _load_json(text: bytes | str, where: str, remedy: str, limit: int = MAX_BYTES) -> Any:
    """JSON of bounded size and depth, without repeated keys and half characters."""
    if len(text) > limit:
        raise UserError(f"{where}: larger than {limit >> 20} MiB; {remedy}")
    try:
        data = text.encode() if isinstance(text, str) else text
        value = _fast_json(data, cache_mode="keys", catch_duplicate_keys=True) if _fast_json else None
    except ValueError:
        value = None
    if value is None:  # what the fast decoder refuses, Python's reads again: it says what is wrong, and where
        return _load_json_slowly(text, where, remedy)
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:  # fewer brackets cannot nest deeper
        _check_nesting(value, where, remedy)
    return value


def _load_json_slowly(text: bytes | str, where: str, remedy: str) -> Any:
    """The same by Python's decoder."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); {remedy}") from None
    except RecursionError:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); {remedy}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_nesting(value, where, remedy)
    if not text.isascii() or "\\ud" in text or "\\uD" in text:
        _check_characters(value, where, remedy)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"the key {shown(_repeated(key for key, _ in pairs))} twice in one object")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Made once: `json.loads` would make one for every row."""


def _repeated(keys: Iterable[Any]) -> Any:
    """The first key that comes a second time, or None."""
    seen: set[Any] = set()
    return next((key for key in keys if key in seen or seen.add(key)), None)  # type: ignore[func-returns-value]


def _check_nesting(value: Any, where: str, remedy: str) -> None:
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested deeper than {MAX_DEPTH}; {remedy}")
        if sum(map(len, level)) > MAX_ITEMS:
            raise UserError(f"{where}: more than {MAX_ITEMS:,} values; {remedy}")
        below = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in below if isinstance(child, dict | list)]


def _check_characters(value: Any, where: str, remedy: str) -> None:
    """Refuses the halves of a character (lone surrogates), which JSON can spell but no text can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{where}: {half} is half a character (a lone surrogate); {remedy}") from None


@functools.cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader; equal keys, merges of merges (which grow and grow) and endless numbers are refused."""

        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", node.start_mark)

        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            if "\0" in value:  # no path, name or setting may hold one, and Python raises wherever it meets it
                raise yaml.constructor.ConstructorError(None, None, "a text with a NUL character", node.start_mark)
            return value

        def construct_yaml_int(self, node: Any) -> int:
            value = super().construct_yaml_int(node)
            if value.bit_length() > 64:  # in hexadecimal of any length, which Python would not even print
                raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
            return value

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            mapping = super().construct_mapping(node, deep)
            if len(mapping) < len(node.value):
                twice = _repeated(self.construct_object(key, deep=True) for key, _ in node.value)
                raise yaml.constructor.ConstructorError(None, None, f"the key {shown(twice)} twice", node.start_mark)
            return mapping

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    return Loader


def _explain(problem: Any, where: str, remedy: str) -> str:
    """pydantic's first finding in one line of ours."""
    field = _field(problem["loc"])
    if problem["type"] == "missing":
        return f"{where}: {field} is missing; {remedy}"
    if problem["type"] == "extra_forbidden":
        return f"{where}: {field} means nothing here; {remedy}"
    must = _must(problem)
    if not field:
        return f"{where}: holds {_kind(problem['input'])}; it must {must}; {remedy}"
    return f"{where}: {field} is {shown(problem['input'])}; it must {must}; {remedy}"


_BOUNDS = {
    "less_than_equal": "be at most {le}",
    "less_than": "be below {lt}",
    "greater_than_equal": "be at least {ge}",
    "greater_than": "be above {gt}",
    "too_long": "have at most {max_length} items",
    "too_short": "have at least {min_length} items",
    "string_too_long": "have at most {max_length} characters",
    "string_too_short": "have at least {min_length} characters",
}
"""pydantic's kinds of errors that have a number, in our words."""


def _must(problem: Any) -> str:
    if isinstance(problem["input"], float) and not math.isfinite(problem["input"]):
        return "be a finite number"
    if problem["type"] in _BOUNDS:
        return _BOUNDS[problem["type"]].format(**problem["ctx"])
    if problem["type"] == "predicate_failed":
        return "be " + next(says for test, says in _SAYS.items() if test.__name__ in problem["msg"])
    return problem["msg"].removeprefix("Input should ").replace("a valid dictionary", "an object")


def _field(steps: tuple[str | int, ...]) -> str:
    """`files.tokens.bin[0]` of ("files", "tokens.bin", 0)."""
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    return name if len(name) <= 200 and name.isprintable() else shown(name)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
