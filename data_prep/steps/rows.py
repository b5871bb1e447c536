"""Step-aware traces as rows of chat JSONL: the four parts as reasoning, the answer, stages and weights as spans.

A share of the rows has one wrong value in EXECUTE, propagated exactly, and VERIFY says so: trained on right traces
alone a model learns to say "ok". From the wrong value to the end of EXECUTE the loss has weight 0, or the model would
be taught to err. Every row carries its graph as `trace`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.steps.grammar import STAGES, VERIFY, TraceText, write
from data_prep.steps.graph import Problem, Trace, Value, show
from data_prep.steps.programs import STEPS, draw_problem, with_an_error
from nano3.cli import UserError
from nano3.messages import AFTER_REASONING

SOURCE = "steps/lists"
"""Source of the rows, and what `generate.py --task` calls them."""


def step_rows(size: int, seed: int, steps: int | None = None, injected: float = 0.0) -> Iterator[dict[str, Any]]:
    """`size` list programs as rows; of each, `injected` is the chance that EXECUTE has an error.

    Raises:
        UserError: parameters out of their ranges.
    """
    if steps is not None and not (isinstance(steps, int) and STEPS[0] <= steps <= STEPS[1]):
        raise UserError(f"steps={steps} is not from {STEPS[0]} to {STEPS[1]}")
    if not isinstance(injected, int | float) or not 0 <= injected <= 1:
        raise UserError(f"injected={injected} is no share from 0 to 1")
    for number in range(size):
        problem = draw_problem(seed, number, steps)
        source = random.Random(f"steps-error:{seed}:{number}")
        executed = with_an_error(problem.trace, source) if source.random() < injected else None
        facts = {"id": f"lists-{seed}-{number}", "source": SOURCE, "subject": f"{len(problem.trace.steps)} steps"}
        yield facts | chat_row(problem, executed)


def chat_row(problem: Problem, executed: Mapping[str, Value] | None = None) -> dict[str, Any]:
    """The problem as a chat row; with `executed` EXECUTE has those values, which `trace` tells too."""
    text = write(problem.trace, problem.goal, executed)
    answer = show(problem.trace.answer)
    facts = trace_json(problem.trace)
    if executed is not None:
        facts["executed"] = {name: show(value) for name, value in executed.items()}
    said = {"role": "assistant", "reasoning_content": text.text, "content": answer, "spans": _spans(text, answer)}
    return {
        "answer": answer,
        "trace": facts,
        "messages": [{"role": "user", "content": problem.question}, said],
    }


def trace_json(trace: Trace) -> dict[str, Any]:
    """A trace as JSON: values as text, the answer by its step."""
    nodes = [
        {"id": step.id, "op": step.op, "in": list(step.operands), "value": show(step.value)} for step in trace.steps
    ]
    inputs = {name: show(value) for name, value in trace.inputs.items()}
    return {"inputs": inputs, "nodes": nodes, "answer": trace.steps[-1].id}


def _spans(text: TraceText, answer: str) -> list[dict[str, Any]]:
    """The stages in characters of what the model writes, EXECUTE cut where its weight becomes 0.

    The mark of VERIFY counts as EXECUTE, with weight 1: an adapter that acts from the mark on never writes it, so the
    one that learns EXECUTE must, whatever weight it gives to VERIFY.
    """
    spans: list[dict[str, Any]] = []
    for stage, (start, end) in text.parts.items():
        cut = text.wrong if stage == "EXECUTE" and text.wrong is not None else end
        if stage == "VERIFY":
            marked = start + len(VERIFY)
            spans.append({"start": start, "end": marked, "stage": STAGES["EXECUTE"]})
            start = marked
        spans.append({"start": start, "end": cut, "stage": STAGES[stage]})
        if cut < end:
            spans.append({"start": cut, "end": end, "stage": STAGES[stage], "weight": 0.0})
    begins = len(text.text) + len(AFTER_REASONING)
    return [*spans, {"start": begins, "end": begins + len(answer), "stage": STAGES["ANSWER"]}]
