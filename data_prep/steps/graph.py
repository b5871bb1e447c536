"""A problem as a graph: every step applies one operation to inputs or earlier steps, and has the value that follows.

    x = 52, 7, 31      s1 = sort x      s2 = keep > 30 s1      s3 = first s2      -> s1 7, 31, 52; s2 31, 52; s3 31

A value is a list of whole numbers or one number, and its type follows from the operation. Values are exact: fractions
stay fractions. The last step is the answer.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

Value = Fraction | tuple[int, ...]

LIST, NUMBER = "list", "number"
EMPTY = "none"
"""How a list without numbers is written."""
LARGEST_DIGITS = 15
"""Digits of a number at most: no text makes a value that is slow to compute with."""

_NUMBER = re.compile(rf"(-?\d{{1,{LARGEST_DIGITS}}})(?:\.(\d{{1,{LARGEST_DIGITS}}})|/(\d{{1,{LARGEST_DIGITS}}}))?")


class Undefined(ValueError):
    """An operation has no value here: the first of no numbers, a division by zero."""


@dataclass(frozen=True)
class Operation:
    """What a step does: the types that it takes and gives, and whether the order of its operands matters not."""

    takes: tuple[str, ...]
    gives: str
    apply: Callable[..., Value]
    commutes: bool = False


def _at(place: int) -> Callable[[tuple[int, ...]], Value]:
    def item(numbers: tuple[int, ...]) -> Value:
        if not numbers:
            raise Undefined("an empty list has no first and no last number")
        return Fraction(numbers[place])

    return item


def _divided(left: Fraction, right: Fraction) -> Value:
    if not right:
        raise Undefined("nothing is divided by zero")
    return left / right


_PLAIN = {
    "sort": Operation((LIST,), LIST, lambda numbers: tuple(sorted(numbers))),
    "reverse": Operation((LIST,), LIST, lambda numbers: numbers[::-1]),
    "first": Operation((LIST,), NUMBER, _at(0)),
    "last": Operation((LIST,), NUMBER, _at(-1)),
    "count": Operation((LIST,), NUMBER, lambda numbers: Fraction(len(numbers))),
    "add": Operation((NUMBER, NUMBER), NUMBER, lambda left, right: left + right, commutes=True),
    "subtract": Operation((NUMBER, NUMBER), NUMBER, lambda left, right: left - right),
    "multiply": Operation((NUMBER, NUMBER), NUMBER, lambda left, right: left * right, commutes=True),
    "divide": Operation((NUMBER, NUMBER), NUMBER, _divided),
}
_BOUND = re.compile(rf"keep ([<>]) (\d{{1,{LARGEST_DIGITS}}})")


def operation(text: str) -> Operation | None:
    """The operation of a name such as `sort` or `keep > 30`, or None."""
    if bound := _BOUND.fullmatch(text):
        sign, limit = 1 if bound[1] == ">" else -1, int(bound[2])
        return Operation((LIST,), LIST, lambda numbers: tuple(n for n in numbers if sign * n > sign * limit))
    return _PLAIN.get(text)


def show(value: Value) -> str:
    """A value as text: `7, 31`, `none`, `31`, `2.5` where a decimal fraction is exact and short, else `1/3`."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or EMPTY
    digits = next((n for n in range(LARGEST_DIGITS) if (value * 10**n).denominator == 1), None)
    if not digits:
        return str(value)
    whole, part = divmod(abs(value.numerator) * 10**digits // value.denominator, 10**digits)
    return f"{'-' if value < 0 else ''}{whole}.{part:0{digits}d}"


def read_value(text: str, kind: str) -> Value | None:
    """The value of a text of this type, or None where `show` would not write it so."""
    if kind == LIST:
        parts = [] if text == EMPTY else text.split(", ")
        if not all(re.fullmatch(rf"-?\d{{1,{LARGEST_DIGITS}}}", part) for part in parts):
            return None
        value: Value = tuple(map(int, parts))
    else:
        found = _NUMBER.fullmatch(text)
        if not found or (found[3] and not int(found[3])):
            return None
        value = Fraction(text)
    return value if show(value) == text else None


@dataclass(frozen=True)
class Step:
    """One step: the operation's name, the names of its operands, and its value."""

    id: str
    op: str
    operands: tuple[str, ...]
    value: Value

    def with_value(self, value: Value) -> Step:
        """The same step with another value."""
        return replace(self, value=value)


@dataclass(frozen=True)
class Trace:
    """Inputs by name and steps in an order in which each follows its operands; the last one is the answer."""

    inputs: Mapping[str, Value]
    steps: tuple[Step, ...]

    @property
    def values(self) -> dict[str, Value]:
        """The value of each step, as it stands."""
        return {step.id: step.value for step in self.steps}

    @property
    def answer(self) -> Value:
        return self.steps[-1].value


@dataclass(frozen=True)
class Problem:
    """A question in words, the goal that the text of its trace names, and its right trace."""

    question: str
    goal: str
    trace: Trace


def recomputed(trace: Trace, fixed: Mapping[str, Value] | None = None) -> dict[str, Value]:
    """The value of each step from the inputs alone, where those in `fixed` have the value given there instead.

    Raises:
        Undefined: an operation has no value for its operands.
    """
    known: dict[str, Value] = dict(trace.inputs)
    for step in trace.steps:
        if fixed is not None and step.id in fixed:
            known[step.id] = fixed[step.id]
        else:
            known[step.id] = applied(step, known)
    return {step.id: known[step.id] for step in trace.steps}


def applied(step: Step, known: Mapping[str, Value]) -> Value:
    """The operation of a step on the values of its operands. Raises `Undefined`."""
    found = operation(step.op)
    assert found is not None, f"{step.op} is no operation"
    return found.apply(*(known[name] for name in step.operands))


def descendants(steps: Sequence[Step], origin: str) -> set[str]:
    """The steps whose value depends on `origin`, itself included."""
    reached = {origin}
    for step in steps:
        if reached.intersection(step.operands):
            reached.add(step.id)
    return reached


def canonical_edges(trace: Trace) -> Counter[tuple[str, str]]:
    """The dependencies (operand, step), each end by what it computes and not by its name.

    A step's form is its operation with the forms of its operands, ordered where their order matters; an input's is its
    value. So neither names nor the order of independent steps count. A form is a digest: nested ones would grow without
    bound.
    """
    forms = {name: _digest("input", show(value)) for name, value in trace.inputs.items()}
    edges: Counter[tuple[str, str]] = Counter()
    for step in trace.steps:
        parts = [forms[name] for name in step.operands]
        found = operation(step.op)
        forms[step.id] = _digest(step.op, *(sorted(parts) if found and found.commutes else parts))
        edges.update((part, forms[step.id]) for part in parts)
    return edges


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
