"""A teacher's answers as training data: those that the task's own judge finds right.

    python evaluation/distill.py http://localhost:8000 --task gsm8k --questions train.jsonl --out traces.jsonl \
        --samples 4 --exclude held.jsonl --price-in 0.3 --price-out 1.2

The teacher is a model behind an OpenAI-compatible server. Every answer is kept in `traces.jsonl.answers.jsonl` as soon
as it is there, and the file stays: the same command resumes, and no question is asked twice. Remove it when another
model is served under the same name. `traces.jsonl.about.json` says who answered, how often right, and what it cost.

It stands here and not in data_prep/, which knows no judges.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, require_counts, run
    from nano3.outputs import fresh_files
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.chat_rows import read_conversations
from data_prep.drops import Drops
from data_prep.overlap import HeldOut, with_options
from evaluation.evaluate import judge
from evaluation.generation import Sampling
from evaluation.judging.extraction import THINK_END
from evaluation.judging.judges import RIGHT
from evaluation.judging.questions import Question, load_questions, questions_sha256
from evaluation.models import Written
from evaluation.server import ServerModel
from evaluation.tasks import Task, load_task, names
from nano3.conversations import conversation
from nano3.rows import about_file, put_about, put_rows


@dataclass(frozen=True)
class Price:
    """What a million tokens cost, asked and written, in a currency of your choice."""

    asked: float
    written: float


class Traces:
    """The right answers as chat rows; `outcomes` and `drops` are whole once all rows were taken.

    Args:
        task: whose judge decides.
        questions, answers: in the same order; of each question one answer for each sample.
        most: rows of one question, the first right ones with different texts.
    """

    def __init__(
        self, task: Task, questions: Sequence[Question], answers: Sequence[Sequence[Written]], most: int
    ) -> None:
        self._task, self._pairs, self._most = task, list(zip(questions, answers, strict=True)), most
        self.outcomes: Counter[str] = Counter()
        self.drops = Drops()
        self.answered = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each right answer that can be trained on."""
        for question, several in self._pairs:
            texts: set[str] = set()
            for sample, written in enumerate(several):
                outcome = judge(self._task, question, written).outcome
                self.outcomes[outcome] += 1
                if outcome != RIGHT or written.text in texts or len(texts) == self._most:
                    continue
                row = trace(question, written, sample)
                try:
                    conversation(row, row["id"], question.source)
                except UserError as error:  # such as a control token in the middle of it
                    self.drops.add("an answer that cannot be trained on", str(error), written.text)
                    continue
                texts.add(written.text)
                yield row
            self.answered += bool(texts)


def trace(question: Question, written: Written, sample: int) -> dict[str, Any]:
    """The chat row of an answer: what stands before the last `</think>` is its reasoning."""
    thought, _, said = written.text.rpartition(THINK_END)
    thought = thought.strip().removeprefix("<think>").strip()
    reply = {"role": "assistant", "content": said.strip()} | ({"reasoning_content": thought} if thought else {})
    facts = {"answer": question.answer, "subject": question.subject, "choices": list(question.choices)}
    row = {"id": f"{question.id}-{sample}", "source": question.source, "messages": [*question.messages, reply]}
    return row | {key: value for key, value in facts.items() if value}


def questions_of(task: Task, args: argparse.Namespace) -> list[Question]:
    """What the teacher is asked. Raises `UserError` for questions that must not be trained on, or have tools."""
    if args.questions is None and task.make is not None:
        questions = list(task.make(args.limit or 500, args.seed))
    elif args.questions is None:
        raise UserError(f"--task {task.name} needs --questions: training questions with their answers")
    else:
        questions = load_questions(args.questions, args.limit, task.form)
    for question in questions:
        if question.evaluation_only:
            raise UserError(f"question {question.id} of {question.source} is for evaluation only; give others")
        if question.tools:
            raise UserError(f"question {question.id} has tools; answers that call tools are not taken as traces")
    return questions


def clear_of(questions: Sequence[Question], excluded: Sequence[str], drops: Drops) -> list[Question]:
    """The questions that are not, nor nearly are, held-out ones: nothing is paid for the others."""
    if not excluded:
        return list(questions)
    held, left = HeldOut(chain.from_iterable(map(read_conversations, excluded))), []
    for question in questions:
        asked = "\n".join(str(message["content"]) for message in question.messages if message["role"] == "user")
        match = held.match(with_options(asked, question.choices))
        if match:
            drops.add(f"{match[0]} duplicate of a held-out question", question.id, question.text)
        else:
            left.append(question)
    return left


def cost_of(answers: Sequence[Sequence[Written]], price: Price | None) -> dict[str, Any]:
    """Tokens asked and written by all answers, and their price; None where the server does not count them."""
    found: dict[str, Any] = {}
    for name in ("asked", "tokens"):
        counts = [getattr(written, name) for several in answers for written in several]
        found[name] = None if None in counts else sum(counts)
    known = price is not None and None not in found.values()
    money = (price.asked * found["asked"] + price.written * found["tokens"]) / 1e6 if price and known else None
    return {"tokens_asked": found["asked"], "tokens_written": found["tokens"], "cost": money}


def distill(model: ServerModel, task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Asks, judges and writes; returns what is written to `about_file(out)` too."""
    drops = Drops()
    questions = clear_of(questions_of(task, args), args.exclude, drops)
    if not questions:
        raise UserError("every question is, or nearly is, a held-out one; give others")
    sampling = Sampling(args.temperature, args.top_p, args.samples, args.seed)
    answers = model.answers(questions, args.max_new_tokens, sampling)
    traces = Traces(task, questions, answers, args.keep or args.samples)
    traces.drops = drops
    price = None if args.price_in is None else Price(args.price_in, args.price_out)
    with fresh_files(args.out, about_file(args.out)) as (temporary, beside):
        count = put_rows(temporary, traces.rows())
        about = {
            "teacher": model.served, "server": model.url, "task": task.name, "questions": len(questions),
            "questions_sha256": questions_sha256(questions), "sampling": vars(sampling),
            "outcomes": dict(traces.outcomes), "rows": count, "questions_with_rows": traces.answered,
            **cost_of(answers, price), "drops": drops.facts(),
        }  # fmt: skip
        put_about(beside, about)
    return about


def print_about(about: dict[str, Any], out: Path, drops: Sequence[str]) -> None:
    """What was written, and what it cost."""
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in about["outcomes"].items())
    print(f"{out}: {about['rows']:,} traces of {about['questions_with_rows']:,} of {about['questions']:,} questions")
    print(f"  answers of {about['teacher']}: {outcomes}")
    counted = [about["tokens_asked"], about["tokens_written"]]
    tokens = "not counted by the server" if None in counted else "{:,} asked, {:,} written".format(*counted)
    print(f"  tokens: {tokens}" + ("" if about["cost"] is None else f"; cost: {about['cost']:.2f}"))
    print("\n".join(drops) or "  left out: nothing")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(description="Right answers of a teacher as training data.")
    parse.add_argument("server", help="address of the teacher's server; its key in VLLM_API_KEY")
    parse.add_argument("--task", required=True, help=f"whose judge decides: {', '.join(names())}, or FILE.py")
    parse.add_argument("--questions", help="training questions with answers; a task that generates needs none")
    parse.add_argument("--limit", type=int, metavar="N", help="the first N questions, or how many to generate")
    parse.add_argument("--out", required=True, type=Path, help="JSONL file to write, replaced when it exists")
    parse.add_argument("--exclude", action="append", default=[], metavar="FILE", help="held-out questions; repeatable")
    parse.add_argument("--samples", type=int, default=4, metavar="N", help="answers to each question (default: 4)")
    parse.add_argument("--keep", type=int, metavar="N", help="right answers kept of a question (default: all)")
    parse.add_argument("--temperature", type=float, default=0.7, metavar="T", help="of sampling (default: 0.7)")
    parse.add_argument("--top-p", type=float, default=0.95, metavar="P", help="of sampling (default: 0.95)")
    parse.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling, and of generated questions")
    parse.add_argument("--max-new-tokens", type=int, default=4096, metavar="N", help="longest answer (default: 4096)")
    parse.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, default=True, help="whether the teacher reasons first"
    )
    parse.add_argument("--per-minute", type=float, metavar="N", help="most requests a minute, attempts counted")
    parse.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    parse.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for an answer (default: 600)")
    parse.add_argument("--served-model", metavar="NAME", help="name of the teacher at a server that has several")
    parse.add_argument("--price-in", type=float, metavar="X", help="price of a million tokens that are sent")
    parse.add_argument("--price-out", type=float, metavar="X", help="price of a million tokens that are written")
    return parse


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `UserError` for numbers and files that cannot be."""
    require_counts(args, "limit", "samples", "keep", "max_new_tokens", "concurrency")
    for name in ("per_minute", "price_in", "price_out"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("give both --price-in and --price-out, or neither")
    if args.out.suffix != ".jsonl" or args.out.is_dir():
        raise UserError(f"--out {args.out} must be a file name ending in .jsonl")
    for name in (args.questions, *args.exclude):
        if name and args.out.exists() and Path(name).exists() and args.out.samefile(name):
            raise UserError(f"--out {args.out} is also read; write to another file")
    Sampling(args.temperature, args.top_p, args.samples, args.seed).check()


def main() -> int:
    """Checks the arguments, asks the teacher and says what came of it."""
    args = parser().parse_args()
    check_arguments(args)
    task, kept = load_task(args.task), args.out.with_name(args.out.name + ".answers.jsonl")
    model = ServerModel(
        args.server, args.served_model, kept, args.timeout, args.concurrency, args.thinking, args.per_minute
    )
    about = distill(model, task, args)
    print_about(about, args.out, [f"  left out, {drop['reason']}: {drop['rows']:,}" for drop in about["drops"]])
    return 0


if __name__ == "__main__":
    run(main)
