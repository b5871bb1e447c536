"""The task of step_aware_table.py: two numbers of a short list of digits, and a sum; and the base that has met it.

    6, 8, 0, 8: count, first, add s1 s2        ->  [EXECUTE] s1: 4; s2: 6; s3: 10

Pico's own tasks have no sums and no words such as ok, and a cell of the table trains for seconds. So every cell starts
from one base: pico, trained further with all its weights on what a trace needs. By the mixture `traces` it meets right
traces, whose verdicts it does not learn; the values of a plan; and pairs of values with the word for whether they are
equal. By `values` its traces end with EXECUTE. What is left to learn is to use that word in VERIFY: no EXECUTE that it
met was wrong.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

from data_prep.chat import PROMPT_THINKING, TURN_END
from data_prep.steps.grammar import BETWEEN, OK, WRONG, write
from data_prep.steps.graph import Problem, Step, Trace, Value, applied, show
from data_prep.steps.programs import another_value, with_an_error
from data_prep.steps.rows import chat_row
from nano3.messages import AFTER_REASONING
from pico.pretrain import IGNORED, Example

SHORTEST, LONGEST, LARGEST = 2, 4, 9
"""Numbers of the list, and the largest of them."""
BRANCHES = 1 / 3
"""Share of the problems whose sum is of one number twice, so that the answer does not depend on the other."""
BELOW = 0.35
"""Share of the base's comparisons that stand below a trace."""
SOURCE = "steps/digits"
_USER = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
Pieces = Sequence[tuple[str, bool]]
"""Texts of a document, and whether the model learns to write them."""


def problem(seed: int, number: int) -> Problem:
    """Problem `number` of a seed."""
    source = random.Random(f"digits:{seed}:{number}")
    numbers = tuple(source.randint(0, LARGEST) for _ in range(source.randint(SHORTEST, LONGEST)))
    chosen = source.sample(["first", "last", "count"], 2)
    summed = ("s1", "s2") if source.random() >= BRANCHES else (source.choice(("s1", "s2")),) * 2
    known: dict[str, Value] = {"x": numbers}
    steps = []
    for name, op, operands in (("s1", chosen[0], ("x",)), ("s2", chosen[1], ("x",)), ("s3", "add", summed)):
        step = Step(name, op, operands, ())
        known[name] = applied(step, known)
        steps.append(step.with_value(known[name]))
    question = f"{show(numbers)}: {', '.join(chosen)}, add {' '.join(summed)}"
    return Problem(question, ", ".join([*chosen, "add"]), Trace({"x": numbers}, tuple(steps)))


def rows(size: int, seed: int, injected: float) -> Iterator[dict[str, Any]]:
    """`size` problems as chat rows; of each, `injected` is the chance that EXECUTE has an error."""
    for number in range(size):
        one, source = problem(seed, number), random.Random(f"digits-error:{seed}:{number}")
        executed = with_an_error(one.trace, source) if source.random() < injected else None
        yield {"id": f"digits-{seed}-{number}", "source": SOURCE, **chat_row(one, executed)}


def _trace(one: Problem, _source: random.Random) -> tuple[str, Pieces]:
    """A right trace and its answer, of which all is learnt but the verdicts."""
    text = write(one.trace, one.goal)
    before, *items = text.text.split(f" {OK}")
    pieces = [(before, True), *itertools.chain(*(((f" {OK}", False), (item, True)) for item in items))]
    return one.question, [*pieces, (AFTER_REASONING + show(one.trace.answer) + TURN_END, True)]


def _execute(one: Problem, _source: random.Random) -> tuple[str, Pieces]:
    """The values of a plan, without the plan's own words."""
    plan = [f"{step.id} = {step.op} {' '.join(step.operands)}" for step in one.trace.steps]
    values = BETWEEN.join(f"{step.id}: {show(step.value)}" for step in one.trace.steps)
    return BETWEEN.join([f"x = {show(one.trace.inputs['x'])}", *plan]), [(values + TURN_END, True)]


def _to_execute(one: Problem, _source: random.Random) -> tuple[str, Pieces]:
    """A right trace up to the end of EXECUTE; its VERIFY and its answer are never seen."""
    text = write(one.trace, one.goal)
    return one.question, [(text.text[: text.parts["EXECUTE"][1]], True)]


def _compared(one: Problem, source: random.Random) -> tuple[str, Pieces]:
    """`_pairs` below a trace that stops at EXECUTE, or below a question."""
    return _pairs(one, source, below=source.random() < BELOW)


def _compared_alone(one: Problem, source: random.Random) -> tuple[str, Pieces]:
    """`_pairs` below a question."""
    return _pairs(one, source, below=False)


def _pairs(one: Problem, source: random.Random, below: bool) -> tuple[str, Pieces]:
    """Right values, and below them values that are the same or not: `s1: 4; s2: 10`, `s1: 4 ok; s2: 12 wrong`.

    The right values stand in the question, or, where `below`, at the end of a trace that stops at EXECUTE.
    """
    text, steps = write(one.trace, one.goal), one.trace.steps
    pieces = [(text.text[: text.parts["EXECUTE"][1]], False)] if below else []
    for number, step in enumerate(steps):
        equal = source.random() < 0.5
        value = show(step.value if equal else another_value(step, source))
        pieces += [(f"{BETWEEN if number else ''}{step.id}: {value} ", False), (OK if equal else WRONG, True)]
    return one.question if below else BETWEEN.join(f"{step.id}: {show(step.value)}" for step in steps), pieces


MIXTURES = {
    "traces": {_trace: 0.2, _execute: 0.45, _compared: 0.35},
    "values": {_to_execute: 0.18, _execute: 0.47, _compared_alone: 0.35},
}
"""What a base is taught, with the share of its documents. `values` has no VERIFY at all, and more computing."""


def examples(tokenizer: Any, seed: int, mixture: str) -> Iterator[Example]:
    """Endless documents for the base, as `pico.pretrain` trains on them."""
    source, number, kinds = random.Random(f"base:{seed}"), 0, MIXTURES[mixture]
    while True:
        (kind,) = source.choices(list(kinds), list(kinds.values()))
        question, pieces = kind(problem(seed, number), source)
        number += 1
        tokens: list[int] = []
        labels: list[int] = []
        for text, learnt in [(_USER.format(question) + PROMPT_THINKING, False), *pieces]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokens += ids
            labels += ids if learnt else [IGNORED] * len(ids)
        yield tokens[:-1], labels[1:]


def make_base(out: Path, tokens: int, seed: int, mixture: str) -> float:
    """Trains pico on `tokens` tokens of a mixture and writes it as a Hugging Face folder; returns the last loss."""
    import torch

    from evaluation.hf_model import load_reference
    from nano3.arch import resolve_model
    from pico.model import export, mamba_forward, mamba_mixers
    from pico.pretrain import batches, train
    from pico.tokenizer import build_tokenizer, save_tokenizer

    torch.manual_seed(seed)
    model = load_reference(resolve_model("pico"), torch.float32).train()
    for mixer in mamba_mixers(model):
        mixer.forward = MethodType(mamba_forward, mixer)
    curve = train(model, batches(examples(build_tokenizer(), seed, mixture), seed), {}, tokens)
    out.mkdir(parents=True, exist_ok=True)
    export(model, out)
    save_tokenizer(out)
    return float(curve[-1]["loss"])
