"""List programs: a few steps on a short list of numbers. A third have a branch, so that the chain is not the graph.

Numbers are small and no step carries, so that a small model can learn each. Problem i of a seed is a function of the
seed and i alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from data_prep.steps.graph import LIST, Problem, Step, Trace, Undefined, Value, applied, operation, recomputed, show

SHORTEST, LONGEST = 3, 5
"""Numbers of the list."""
LARGEST = 99
STEPS = (2, 4)
"""Steps of a program, from and to."""
BRANCHES = 1 / 3
"""Share of programs with three steps or more that have a branch."""
DRAWS = 200

_WORDS = {
    "sort": "sort the numbers of {} in ascending order",
    "reverse": "reverse the order of {}",
    "first": "take the first number of {}",
    "last": "take the last number of {}",
    "count": "count the numbers of {}",
    "keep >": "keep the numbers of {} larger than {}",
    "keep <": "keep the numbers of {} smaller than {}",
}


def draw_problem(seed: int, number: int, steps: int | None = None) -> Problem:
    """Problem `number` of a seed, of `steps` steps where given. Raises `RuntimeError` when none can be drawn."""
    source = random.Random(f"steps:{seed}:{number}:{steps}")
    for _ in range(DRAWS):
        numbers = tuple(source.sample(range(1, LARGEST + 1), source.randint(SHORTEST, LONGEST)))
        trace = _program(source, numbers, steps or source.randint(*STEPS))
        if trace is not None:
            return Problem(_question(trace), ", ".join(step.op for step in trace.steps), trace)
    raise RuntimeError(f"seed {seed}, number {number}: no program of {steps} steps in {DRAWS} draws")


def _program(source: random.Random, numbers: tuple[int, ...], length: int) -> Trace | None:
    """A program, or None where a step would have no value, or would leave a list as it is."""
    known: dict[str, Value] = {"x": numbers}
    lists, steps = ["x"], list[Step]()
    branch = source.randrange(1, length - 1) if length > 2 and source.random() < BRANCHES else None
    for place in range(length):
        # A step takes the latest list, and the one after a branch an earlier one.
        operand = source.choice(lists[:-1]) if branch == place and len(lists) > 1 else lists[-1]
        last = place == length - 1
        names = ["first", "last", "count"] if last else ["sort", "reverse", "keep >", "keep <"]
        op = source.choice(names)
        if op.startswith("keep"):
            op = f"{op} {source.choice(numbers)}"
        step = Step(f"s{place + 1}", op, (operand,), ())
        try:
            value = applied(step, known)
        except Undefined:
            return None
        if value == known[operand] or any((op, (operand,)) == (one.op, one.operands) for one in steps):
            return None
        steps.append(step.with_value(value))
        known[step.id] = value
        if isinstance(value, tuple):
            lists.append(step.id)
    return Trace({"x": numbers}, tuple(steps))


def _question(trace: Trace) -> str:
    names = {"x": "x"} | {step.id: f"step {number}" for number, step in enumerate(trace.steps, 1)}
    shown = ", ".join(map(str, trace.inputs["x"])) if isinstance(trace.inputs["x"], tuple) else ""
    sentences = [f"x is {shown}."]
    for number, step in enumerate(trace.steps, 1):
        kind, _, bound = step.op.rpartition(" ") if step.op.startswith("keep") else (step.op, "", "")
        sentences.append(f"Step {number}: {_WORDS[kind].format(names[step.operands[0]], bound)}.")
    return " ".join([*sentences, f"What is the result of step {len(trace.steps)}?"])


def with_an_error(trace: Trace, source: random.Random) -> Mapping[str, Value] | None:
    """The values of EXECUTE after one wrong step of the right type, propagated exactly; None where none was found.

    The wrong step is any, each as likely as another; steps after it use the wrong value.
    """
    for _ in range(DRAWS):
        step = source.choice(trace.steps)
        wrong = another_value(step, source)
        try:
            values = recomputed(trace, {step.id: wrong}) if wrong != step.value else None
        except Undefined:
            continue
        if values is not None:
            return values
    return None


def another_value(step: Step, source: random.Random) -> Value:
    """A value of the step's type near its own: a number that differs a little, or a list with one thing changed.

    A number keeps its length: a longer one would give itself away.
    """
    found = operation(step.op)
    assert found is not None
    if found.gives != LIST:
        assert not isinstance(step.value, tuple)
        near = [step.value + change for change in (-3, -2, -1, 1, 2, 3)]
        alike = [one for one in near if (one < 0) == (step.value < 0) and len(show(one)) == len(show(step.value))]
        return source.choice(alike or near)
    assert isinstance(step.value, tuple)
    numbers = list(step.value)
    change = source.choice(("swap", "drop", "replace"))
    if change == "swap" and len(numbers) > 1:
        left, right = source.sample(range(len(numbers)), 2)
        numbers[left], numbers[right] = numbers[right], numbers[left]
    elif change == "drop" and numbers:
        numbers.pop(source.randrange(len(numbers)))
    elif numbers:
        numbers[source.randrange(len(numbers))] = source.randint(1, LARGEST)
    return tuple(numbers)
