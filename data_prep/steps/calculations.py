"""Rationales that carry their calculations, as GSM8K's do (`she pays 3*4 = <<3*4=12>>12`), as traces.

Every calculator mark becomes a step for each of its operations. An operand is the earlier step that has its value, else
an input. What that leaves open, or what does not compute, makes no trace: it is counted, with its reason.
"""

from __future__ import annotations

import ast
import re
from fractions import Fraction

from data_prep.steps.graph import LARGEST_DIGITS, NUMBER, Step, Trace, Undefined, Value, applied, read_value, show

_MARK = re.compile(r"<<([^<>=]{1,200})=([^<>=]{1,50})>>")
_OPERATIONS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
}

REASONS = {
    "none": "no calculation",
    "expression": "a calculation of more than numbers and + - * /",
    "twice": "an operand that two earlier steps have the value of",
    "wrong": "a calculation with another result than the one written",
    "answer": "an answer that is not the last calculation's",
    "large": f"a number of more than {LARGEST_DIGITS} characters",
}
"""Why a rationale makes no trace."""


class NoTrace(ValueError):
    """A rationale that makes no trace; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(f"{REASONS[reason]}: {found[:60]!r}")
        self.reason = reason


def trace_of(rationale: str, answer: str) -> Trace:
    """The trace of a rationale, whose last step has the value `answer`. Raises `NoTrace`."""
    builder = _Builder()
    for mark in _MARK.finditer(rationale):
        builder.calculation(mark[1], mark[2])
    if not builder.steps:
        raise NoTrace("none", rationale)
    expected = read_value(answer.replace(",", ""), NUMBER)
    if builder.steps[-1].value != expected:
        raise NoTrace("answer", answer)
    return Trace(builder.inputs, tuple(builder.steps))


class _Builder:
    """Inputs and steps so far; `known` has the value of each."""

    def __init__(self) -> None:
        self.inputs: dict[str, Value] = {}
        self.steps: list[Step] = []
        self.known: dict[str, Value] = {}

    def calculation(self, expression: str, result: str) -> None:
        """Adds the steps of `expression`, whose value must be `result`."""
        cleaned = re.sub(r"[$,\s]", "", expression)
        try:
            tree = ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", cleaned), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise NoTrace("expression", expression) from None
        if not isinstance(tree, ast.BinOp):
            raise NoTrace("expression", expression)
        value = self.known[self._step(tree)]
        if value != _number(re.sub(r"[$,\s]", "", result)):
            raise NoTrace("wrong", f"{expression}={result}")

    def _step(self, node: ast.expr) -> str:
        """The name of what `node` is: a step with its operation, or an operand."""
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            operands = (self._step(node.left), self._step(node.right))
            name = f"s{len(self.steps) + 1}"
            step = Step(name, _OPERATIONS[type(node.op)], operands, ())
            try:
                value = applied(step, self.known)
            except Undefined:
                raise NoTrace("wrong", ast.unparse(node)) from None
            if read_value(show(value), NUMBER) != value:
                raise NoTrace("large", str(value))
            self.steps.append(step.with_value(value))
            self.known[name] = value
            return name
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return self._operand(_number(ast.unparse(node)))
        raise NoTrace("expression", ast.unparse(node))

    def _operand(self, value: Fraction) -> str:
        """The only earlier step with this value, else the input with it."""
        steps = [step.id for step in self.steps if step.value == value]
        if len(steps) > 1:
            raise NoTrace("twice", str(value))
        if steps:
            return steps[0]
        for name, known in self.inputs.items():
            if known == value:
                return name
        name = f"x{len(self.inputs) + 1}"
        self.inputs[name] = self.known[name] = value
        return name


def _number(text: str) -> Fraction:
    if len(text) > LARGEST_DIGITS:
        raise NoTrace("large", text)
    if not re.fullmatch(r"-?\d*\.?\d+\.?", text):
        raise NoTrace("expression", text)
    return Fraction(text.rstrip("."))
