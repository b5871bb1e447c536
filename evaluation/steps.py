"""Measures step-aware answers: faithfulness, soundness, what VERIFY finds, repairs and breaks.

    python evaluation/steps.py MODEL --questions held.jsonl --out steps.json
    python evaluation/steps.py BASE --adapter runs/steps/adapter --questions held.jsonl --out steps.json

Rows are those of `data_prep/generate.py --task steps/lists`, or of any data set with traces. Four kinds of answers are
measured apart: the model's own; its VERIFY after an EXECUTE of ours with one error, and after a right one; and its
EXECUTE after one value of its own was replaced. docs/step_aware.md says what each measure is.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, require_counts, run
    from nano3.outputs import fresh_file
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.steps.grammar import EXECUTE, VERIFY, Unparsed, Written, parse, parse_execute, write
from data_prep.steps.graph import Trace, Undefined, Value, descendants, recomputed, show
from data_prep.steps.programs import another_value, with_an_error
from evaluation.judging.extraction import THINK_END
from evaluation.judging.questions import Question, load_questions, questions_sha256
from evaluation.models import HFModel, beside, identity_of, plain_folder
from evaluation.step_measures import Judged, judged, rate, summary, youden
from nano3.arch import resolve_model

KIND = "step-measures"
SEED = 0
"""Of errors and interventions: the same for every model, so that two models are measured alike."""

Continue = Callable[[Sequence[Question], Sequence[str], int], list[str]]
"""Questions, what the model has written so far, tokens at most -> the whole texts, greedy."""


def teachers(questions: Sequence[Question]) -> list[Written]:
    """The traces that the rows teach. Raises `UserError` for a row without one."""
    found = []
    for question in questions:
        try:
            found.append(parse(question.reasoning))
        except Unparsed as error:
            raise UserError(
                f"question {question.id}: its reasoning is no trace ({error}); make rows with "
                "data_prep/generate.py --task steps/lists"
            ) from error
    return found


def right_trace(taught: Written) -> Trace:
    """The trace with the values that VERIFY gives: right ones, also where EXECUTE has an error."""
    values = taught.verified
    steps = taught.trace.steps
    return Trace(taught.trace.inputs, tuple(step.with_value(values[step.id]) for step in steps))


def split(text: str) -> tuple[str, str]:
    """Reasoning and answer of what a model wrote; without an end of the reasoning there is no answer."""
    reasoning, end, answer = text.partition(THINK_END)
    return (reasoning.strip("\n"), answer.strip()) if end else (text, "")


def after_ours(
    questions: Sequence[Question], taught: Sequence[Written], go_on: Continue, limit: int, error: bool
) -> list[Judged]:
    """VERIFY and answer after the teacher's text up to EXECUTE, which has one error, or is right."""
    chosen, begun = [], []
    for number, (question, one) in enumerate(zip(questions, taught, strict=True)):
        trace = right_trace(one)
        executed = with_an_error(trace, random.Random(f"{SEED}:{number}")) if error else trace.values
        if executed is not None:
            text = write(trace, one.goal, executed)
            chosen.append((question, trace))
            begun.append(text.text[: text.parts["EXECUTE"][1]])
    texts = go_on([question for question, _ in chosen], begun, limit)
    return [judged(trace, *split(text)) for (_, trace), text in zip(chosen, texts, strict=True)]


def after_interventions(
    questions: Sequence[Question], answers: Sequence[str], go_on: Continue, limit: int
) -> dict[str, list[bool]]:
    """RFS-do: one value of the model's own EXECUTE is replaced, and EXECUTE continued.

    Returns whether its answer is the one that follows from the replaced value by its own plan: for values on which the
    answer depends, and apart for those on which it does not.
    """
    cases: dict[str, list[tuple[Question, str, Value]]] = {"changes": [], "keeps": []}
    for number, (question, text) in enumerate(zip(questions, answers, strict=True)):
        for kind, made in _interventions(split(text)[0], random.Random(f"{SEED}:do:{number}")).items():
            cases[kind].append((question, *made))
    found = {}
    for kind, several in cases.items():
        texts = go_on([question for question, *_ in several], [begun for _, begun, _ in several], limit)
        found[kind] = [_executed(text) == value for text, (*_, value) in zip(texts, several, strict=True)]
    return found


def _interventions(reasoning: str, source: random.Random) -> dict[str, tuple[str, Value]]:
    """A replaced value that changes the answer, and one that does not: the text up to it, and the answer then."""
    try:
        trace = parse(reasoning).trace
        values = recomputed(trace)
    except (Unparsed, Undefined):
        return {}
    if values != trace.values:
        return {}
    found: dict[str, tuple[str, Value]] = {}
    last = trace.steps[-1].id
    for step in source.sample(trace.steps[:-1], len(trace.steps) - 1):
        other = another_value(step, source)
        try:
            answer = recomputed(trace, {step.id: other})[last]
        except Undefined:
            continue
        depends = last in descendants(trace.steps, step.id)
        kind = "changes" if depends and answer != trace.answer else "keeps" if not depends else ""
        if kind and other != step.value:
            head, mark, rest = reasoning.partition(EXECUTE)
            before = rest[: rest.index(f" {step.id}: ")]
            found.setdefault(kind, (f"{head}{mark}{before} {step.id}: {show(other)}", answer))
    return found


def _executed(text: str) -> Value | None:
    """EXECUTE's answer in a text, whatever follows it; None where it is none."""
    try:
        return parse_execute(text.partition(VERIFY)[0].rstrip("\n")).answer
    except Unparsed:
        return None


@dataclass(frozen=True)
class Answers:
    """What a model wrote, judged: its own answers, those after our EXECUTE with an error and after a right one, and by
    kind of intervention whether its EXECUTE followed it."""

    own: list[Judged]
    injected: list[Judged]
    right_execute: list[Judged]
    interventions: dict[str, list[bool]]

    def __add__(self, other: Answers) -> Answers:
        """Of both together."""
        done = {kind: flags + other.interventions[kind] for kind, flags in self.interventions.items()}
        injected, right = self.injected + other.injected, self.right_execute + other.right_execute
        return Answers(self.own + other.own, injected, right, done)


def answer(questions: Sequence[Question], go_on: Continue, limit: int) -> Answers:
    """All four kinds of answers to the questions."""
    taught = teachers(questions)
    traces = [right_trace(one) for one in taught]
    texts = go_on(questions, [""] * len(questions), limit)
    return Answers(
        [judged(trace, *split(text)) for trace, text in zip(traces, texts, strict=True)],
        after_ours(questions, taught, go_on, limit, error=True),
        after_ours(questions, taught, go_on, limit, error=False),
        after_interventions(questions, texts, go_on, limit),
    )


def measures(answers: Answers) -> dict[str, Any]:
    """Fields: own, injected and right_execute (`summary` of each), interventions, and given_j: what VERIFY detects of
    injected errors minus its false alarms on right values of ours."""
    found: dict[str, Any] = {
        "own": summary(answers.own),
        "injected": summary(answers.injected),
        "right_execute": summary(answers.right_execute),
        "interventions": {kind: rate(sum(flags), len(flags)) for kind, flags in answers.interventions.items()},
    }
    return found | {"given_j": youden(found["injected"]["detection"], found["right_execute"]["false_alarms"])}


def answers_of(model: HFModel, questions: Sequence[Question]) -> Answers:
    """Those of a model, which may be a quarter longer than the longest that was taught."""
    longest = max(model.count_tokens([question.reasoning + question.written for question in questions]))
    return answer(questions, model.continued, math.ceil(1.25 * longest) + 8)


def measure_model(model: HFModel, questions: Sequence[Question]) -> dict[str, Any]:
    """`measures` of a model."""
    return measures(answers_of(model, questions))


def lines(found: dict[str, Any]) -> list[str]:
    """The measures as a table: what, share, interval, n."""
    rows = [("", "share", "95 %", "n")]
    for part in ("own", "injected", "right_execute"):
        rows += [(f"{part}: {name}", *_cells(value)) for name, value in found[part].items() if name != "n"]
    rows += [(f"RFS-do, the answer {kind}", *_cells(value)) for kind, value in found["interventions"].items()]
    rows.append(("j of injected errors and right values", *_cells(found["given_j"])))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(value: dict[str, Any]) -> tuple[str, str, str]:
    if "share" not in value:
        return "none", "", str(value["n"])
    low, high = value["ci95"]
    return f"{value['share']:.1%}", f"{low:.1%} to {high:.1%}", str(value["n"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or preset")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="LoRA adapter beside MODEL's weights, not merged")
    parser.add_argument("--questions", required=True, metavar="FILE", help="held-out rows with traces")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the measures")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="questions at a time (default: 128)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; 1 is best for small models")
    return parser


def main() -> int:
    args = _parser().parse_args()
    require_counts(args, "limit", "batch_size", "threads")
    folder = resolve_model(args.model)
    questions = load_questions(args.questions, args.limit)
    with ExitStack() as stack:
        plain = stack.enter_context(plain_folder(folder, args.out))
        model = HFModel(plain, args.batch_size, True, threads=args.threads, prepare=beside(args.adapter, plain))
        found = measure_model(model, questions)
        facts = {"model": args.model, "adapter": str(args.adapter) if args.adapter else None}
        hashes = {"questions": questions_sha256(questions), **model.hashes()}
        result = {"kind": KIND, "format": 1, **facts, **identity_of(folder, args.adapter), "hashes": hashes, **found}
    with fresh_file(args.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines(found)))
    print(f"measures in {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
