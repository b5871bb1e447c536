"""The text of a trace in four parts, written and read by one strict grammar.

    [UNDERSTAND] x = 52, 7, 31; goal = sort, keep > 30, first
    [PLAN] s1 = sort x; s2 = keep > 30 s1; s3 = first s2
    [EXECUTE] s1: 7, 31, 52; s2: 52; s3: 52
    [VERIFY] s1: 7, 31, 52 ok; s2: 31, 52 wrong; s3: 31

VERIFY computes each step again and then says whether EXECUTE had that value; after the first wrong one it computes the
rest. Text that is not exactly so is `Unparsed`, with its reason; nothing is repaired.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.steps.graph import EMPTY, LIST, NUMBER, Step, Trace, Value, operation, read_value, show

UNDERSTAND, PLAN, EXECUTE, VERIFY = MARKS = ("[UNDERSTAND]", "[PLAN]", "[EXECUTE]", "[VERIFY]")
STAGES = {mark.strip("[]"): number for number, mark in enumerate(MARKS, 1)} | {"ANSWER": 5}
"""Names and numbers of the stages in a token store."""
OK, WRONG = "ok", "wrong"
GOAL = "goal"
BETWEEN = "; "

REASONS = {
    "marks": "not each of the four marks once, in their order, each at the beginning of its line",
    "input": "an input that is not NAME = VALUE, or no input",
    "goal": "no goal at the end of UNDERSTAND",
    "step": "a step of the plan that is not NAME = OPERATION OPERANDS",
    "operation": "an operation that does not exist",
    "twice": "a name that is declared twice",
    "undeclared": "an operand that is not declared before its use",
    "operands": "operands that are not of the number or the types that the operation takes",
    "execute": "EXECUTE has other steps than the plan, or in another order",
    "value": "a value that is not of the step's type, or not in its one spelling",
    "verify": "VERIFY has other steps than the plan, or in another order",
    "verdict": "a step without its verdict, a verdict after the first wrong one, or another word",
}
"""Why a text is no trace."""


class Unparsed(ValueError):
    """A text that is no trace; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(f"{REASONS[reason]}: {found[:60]!r}")
        self.reason = reason


@dataclass(frozen=True)
class Written:
    """What a text says: its goal, the plan with EXECUTE's values, VERIFY's values, and the first step that VERIFY calls
    wrong."""

    goal: str
    trace: Trace
    verified: dict[str, Value]
    flagged: str | None


@dataclass(frozen=True)
class TraceText:
    """A trace as text; `parts` has the characters of each stage, `wrong` where EXECUTE's first wrong value begins."""

    text: str
    parts: dict[str, tuple[int, int]]
    wrong: int | None


def write(trace: Trace, goal: str, executed: Mapping[str, Value] | None = None) -> TraceText:
    """The text of a right trace whose EXECUTE has the values `executed`, by default the right ones.

    A stage goes from its mark to the next one. `wrong` counts from the blank before the value, which many tokenizers
    join with what follows.
    """
    right = trace.values
    executed = executed or right
    flagged = next((name for name, value in right.items() if executed[name] != value), None)
    inputs = [f"{name} = {show(value)}" for name, value in trace.inputs.items()]
    plan = [f"{step.id} = {step.op} {' '.join(step.operands)}" for step in trace.steps]
    execute = [f"{name}: {show(executed[name])}" for name in right]
    lines = [f"{UNDERSTAND} {BETWEEN.join([*inputs, f'{GOAL} = {goal}'])}", f"{PLAN} {BETWEEN.join(plan)}"]
    lines += [f"{EXECUTE} {BETWEEN.join(execute)}", f"{VERIFY} {BETWEEN.join(_verdicts(right, flagged))}"]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    parts = {stage: (starts[number - 1], starts[number]) for stage, number in STAGES.items() if number <= len(lines)}
    wrong = None
    if flagged is not None:
        before = execute[: list(right).index(flagged)]
        wrong = parts["EXECUTE"][0] + len(f"{EXECUTE} {''.join(item + BETWEEN for item in before)}{flagged}:")
    text = "\n".join(lines)
    parts["VERIFY"] = (parts["VERIFY"][0], len(text))
    return TraceText(text, parts, wrong)


def _verdicts(right: Mapping[str, Value], flagged: str | None) -> list[str]:
    items, open_ = [], True
    for name, value in right.items():
        verdict = f" {WRONG if name == flagged else OK}" if open_ else ""
        items.append(f"{name}: {show(value)}{verdict}")
        open_ = open_ and name != flagged
    return items


def parse(text: str) -> Written:
    """What the text says. Raises `Unparsed`."""
    *before, verify = _parts(text, MARKS)
    goal, trace = _executed(before)
    names = [step.id for step in trace.steps]
    verdicts = _split_verdicts(verify, len(names))
    verified = _values(verify, trace.steps, "verify", [f" {one}" if one else "" for one in verdicts])
    flagged = names[verdicts.index(WRONG)] if WRONG in verdicts else None
    return Written(goal, trace, dict(zip(names, verified, strict=True)), flagged)


def parse_execute(text: str) -> Trace:
    """The trace of a text that ends with EXECUTE. Raises `Unparsed`."""
    return _executed(_parts(text, MARKS[:3]))[1]


def _executed(parts: Sequence[str]) -> tuple[str, Trace]:
    """Goal and trace of UNDERSTAND, PLAN and EXECUTE."""
    understand, plan, execute = parts
    inputs, goal = _inputs(understand)
    steps = _plan(plan, inputs)
    values = _values(execute, steps, "execute", [""] * len(steps))
    return goal, Trace(inputs, tuple(step.with_value(value) for step, value in zip(steps, values, strict=True)))


def _parts(text: str, marks: Sequence[str]) -> list[str]:
    """What follows each mark on its line."""
    lines = text.split("\n")
    starts = [line.split(" ")[0] for line in lines]
    if starts != list(marks) or any(text.count(mark) != 1 for mark in marks):
        raise Unparsed("marks", text)
    return [line[len(mark) + 1 :] for line, mark in zip(lines, marks, strict=True)]


def _inputs(part: str) -> tuple[dict[str, Value], str]:
    """The inputs, and the goal in words."""
    *items, goal = part.split(BETWEEN)
    if not re.fullmatch(rf"{GOAL} = \S.*", goal):
        raise Unparsed("goal", goal)
    inputs: dict[str, Value] = {}
    for item in items:
        found = re.fullmatch(r"([a-z][a-z0-9]{0,9}) = (.+)", item)
        kind = LIST if found and (", " in found[2] or found[2] == EMPTY) else NUMBER
        value = read_value(found[2], kind) if found else None
        if found is None or value is None:
            raise Unparsed("input", item)
        if found[1] in inputs:
            raise Unparsed("twice", item)
        inputs[found[1]] = value
    if not inputs:
        raise Unparsed("input", part)
    return inputs, goal.removeprefix(f"{GOAL} = ")


def _plan(part: str, inputs: Mapping[str, Value]) -> list[Step]:
    """The steps of the plan, whose values are not known yet: an empty list each."""
    types = {name: LIST if isinstance(value, tuple) else NUMBER for name, value in inputs.items()}
    steps: list[Step] = []
    for item in part.split(BETWEEN):
        found = re.fullmatch(r"([a-z][a-z0-9]{0,9}) = (\S.*)", item)
        if not found:
            raise Unparsed("step", item)
        name, words = found[1], found[2].split(" ")
        # No operation has more than three words; what follows are the operands.
        length = next((n for n in range(1, 4) if operation(" ".join(words[:n]))), 0)
        op, operands = " ".join(words[:length]), tuple(words[length:])
        known = operation(op)
        if known is None:
            raise Unparsed("operation", item)
        if name in types:
            raise Unparsed("twice", item)
        if undeclared := [word for word in operands if word not in types]:
            raise Unparsed("undeclared", f"{undeclared[0]} in {item}")
        if tuple(types[word] for word in operands) != known.takes:
            raise Unparsed("operands", item)
        types[name] = known.gives
        steps.append(Step(name, op, operands, ()))
    return steps


def _values(part: str, steps: Sequence[Step], reason: str, endings: Sequence[str]) -> list[Value]:
    """The values of `NAME: VALUE` items, each with its ending taken off, for the steps in their order."""
    items = part.split(BETWEEN)
    if [item.partition(": ")[0] for item in items] != [step.id for step in steps]:
        raise Unparsed(reason, part)
    values = []
    for item, ending, step in zip(items, endings, steps, strict=True):
        known = operation(step.op)
        value = read_value(item.partition(": ")[2].removesuffix(ending), known.gives) if known else None
        if value is None:
            raise Unparsed("value", item)
        values.append(value)
    return values


def _split_verdicts(part: str, count: int) -> list[str]:
    """The verdict of each step, "" after the first wrong one."""
    found = [re.search(r" (ok|wrong)$", item) for item in part.split(BETWEEN)]
    verdicts = [one[1] if one else "" for one in found]
    first_wrong = verdicts.index(WRONG) if WRONG in verdicts else count - 1
    expected = [bool(number <= first_wrong) for number in range(len(verdicts))]
    if [bool(one) for one in verdicts] != expected and len(verdicts) == count:
        raise Unparsed("verdict", part)
    return verdicts
