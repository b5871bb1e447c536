"""Scores a model on held-out questions, by the judge of a task, with plain transformers and none of our model code.

    python evaluation/evaluate.py MODEL --questions held.jsonl --out result.json          # your own questions
    python evaluation/evaluate.py MODEL --task medmcqa --out result.json                  # a public task
    python evaluation/evaluate.py BASE --adapter runs/lora/adapter --task gsm8k --out result.json
    python evaluation/evaluate.py http://localhost:8000 --task gsm8k --out result.json    # a server
    python evaluation/evaluate.py runs/base --ranks "--local --ranks 2 layout.ep=2" --task medmcqa --out result.json

MODEL is a Hugging Face folder (an FP8 one too), a preset, a NeMo checkpoint (letters, on ranks), or the address of an
OpenAI-compatible server. Two results
are put side by side by evaluation/compare.py, and shown by evaluation/report.py.
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
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.model_folder import named_model
from evaluation.bias import bias, turns_of
from evaluation.comparison import accuracy, interval, share
from evaluation.error_analysis import by_form
from evaluation.generation import GREEDY, Sampling
from evaluation.judging.extraction import after_thinking
from evaluation.judging.judges import OUTCOMES, RIGHT, UNFINISHED, WRONG, Verdict
from evaluation.judging.questions import Question, load_questions, questions_sha256
from evaluation.judging.reasoning_form import reasoning_form
from evaluation.models import HFModel, Model, Written, beside, identity_of, plain_folder
from evaluation.prompts import sha256_of
from evaluation.result_file import KIND, check_result_file, result_text
from evaluation.significance import by_group
from evaluation.tasks import Task, load_task, names
from nano3.arch import is_nemo_checkpoint
from nano3.hf_config import read_config
from nano3.row_keys import LETTERS

if TYPE_CHECKING:
    from evaluation.server import ServerModel

METHODS = ("letters", "generate", "both")
THINKING_ROOM = 2048
"""Tokens for reasoning that no expected answer shows the length of."""


def evaluate(
    model: Model,
    task: Task,
    questions: Sequence[Question],
    method: str | None = None,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    thinking: bool = False,
) -> dict[str, Any]:
    """Asks `model` every question and judges what it says; returns the result that `main` writes.

    Fields: n (questions), correct (right answers, of all samples), accuracy, ci95, outcomes (how many of each of
    `judges.OUTCOMES`), by_source, by_subject, settings, hashes (what must agree before two results compare), and
    answers: a row for each question with its text, what was expected, what was said, the answer found in it and by
    which rule, and the verdict; with `thinking` the form of its reasoning (`reasoning_form.FORMS`). With method
    `letters` the likeliest letter is the answer; with `both` the answer is written, and the row has `letter_correct`
    besides.

    Raises:
        UserError: letters are asked of questions without choices.
    """
    by_letter = model.scores_letters and all(question.choices for question in questions)
    method = method or (task.method if by_letter else "generate")
    if method != "generate":
        _check_choices(questions)
    limit = max_new_tokens or answer_limit(model, task, questions, thinking)
    rows = [_row(question) for question in questions]
    if method != "generate":
        for row, question, scores in zip(rows, questions, model.letters(questions), strict=True):
            row |= _letter_fields(question, scores, alone=method == "letters")
    if method != "letters":
        for row, question, several in zip(rows, questions, model.answers(questions, limit, sampling), strict=True):
            row |= _answer_fields(task, question, several)
            if thinking:
                row["form"] = reasoning_form(several[0].text, several[0].finished)
    settings = {
        "task": task.name,
        "method": method,
        "max_new_tokens": limit if method != "letters" else None,
        "sampling": {name: getattr(sampling, name) for name in ("temperature", "top_p", "samples", "seed")},
    }
    return _result(model, rows, settings, questions_sha256(questions))


def answer_limit(model: Model, task: Task, questions: Sequence[Question], thinking: bool) -> int:
    """Tokens for an answer: a quarter and eight more than the longest expected one, and at least the task's room."""
    texts = [question.written + (question.reasoning if thinking else "") for question in questions]
    longest = max(model.count_tokens(texts), default=0)
    return max(task.room + (THINKING_ROOM if thinking else 0), math.ceil(1.25 * longest) + 8)


def _check_choices(questions: Sequence[Question]) -> None:
    for question in questions:
        if not question.choices:
            raise UserError(
                f"question {question.id} has no 'choices', so that no letter answers it; say --method generate"
            )


def _row(question: Question) -> dict[str, Any]:
    row = {"id": question.id, "source": question.source, "question": question.text, "expected": question.answer}
    return row | ({"subject": question.subject} if question.subject else {})


def _letter_fields(question: Question, scores: Sequence[float], alone: bool) -> dict[str, Any]:
    """The likeliest letter, the first of equals."""
    letter = LETTERS[max(range(len(scores)), key=lambda place: scores[place])]
    correct = letter == question.answer
    fields = {"letter": letter, "letter_correct": correct, "letter_logprobs": [round(score, 6) for score in scores]}
    if not alone:
        return fields
    outcome = RIGHT if correct else WRONG
    return fields | {
        "answer": letter,
        "extracted": letter,
        "rule": "likeliest letter",
        "outcome": outcome,
        "correct": correct,
        "finished": True,
    }


def _answer_fields(task: Task, question: Question, several: Sequence[Written]) -> dict[str, Any]:
    """The first sample's answer and verdict; with several samples the share of right ones, the question's score
    (`comparison.share`). `correct` then says whether more than half are: for lists of what was fixed and broken."""
    verdicts = [judge(task, question, written) for written in several]
    first, verdict = several[0], verdicts[0]
    fields: dict[str, Any] = {
        "answer": after_thinking(first.text),
        "extracted": verdict.answer,
        "rule": verdict.rule,
        "outcome": verdict.outcome,
        "correct": verdict.outcome == RIGHT,
        "finished": first.finished,
        "tokens": first.tokens,
    }
    if len(several) > 1:
        share = sum(verdict.outcome == RIGHT for verdict in verdicts) / len(several)
        samples = [{"answer": one.text, "outcome": v.outcome} for one, v in zip(several, verdicts, strict=True)]
        fields |= {"share": share, "correct": share > 0.5, "samples": samples}
    return fields


def judge(task: Task, question: Question, written: Written) -> Verdict:
    """The task's verdict on what follows the thinking; a text that was cut is unfinished, whatever it says."""
    return task.judge(question, after_thinking(written.text)) if written.finished else UNFINISHED


def _result(model: Model, rows: list[dict[str, Any]], settings: dict[str, Any], questions: str) -> dict[str, Any]:
    result: dict[str, Any] = {"kind": KIND, "format": 2, "model": model.name, **model.identity, "n": len(rows)}
    counts = Counter(row["outcome"] for row in rows)
    result |= {
        "correct": round(sum(map(share, rows)) * settings["sampling"]["samples"]),
        "accuracy": accuracy({"answers": rows}),
        "ci95": list(interval({"answers": rows})),
        "outcomes": {outcome: counts[outcome] for outcome in OUTCOMES},
        "unfinished": counts["unfinished"],
        "by_source": _by(rows, "source"),
    }
    if any(row.get("subject") for row in rows):
        result["by_subject"] = _by(rows, "subject")
    if forms := by_form(rows):
        result["by_form"] = forms
    text = json.dumps(settings, sort_keys=True)
    result["settings"] = settings | model.facts()
    result["hashes"] = {"questions": questions, **model.hashes(), "sampling": sha256_of(text)}
    return result | {"answers": rows}


def _by(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    groups = by_group([row.get(key) or "" for row in rows], [share(row) for row in rows])
    return {
        name: {"n": group.n, "accuracy": group.accuracy, "ci95": list(group.interval)}
        for name, group in sorted(groups.items())
    }


def evaluate_model(
    folder: Path | str,
    questions: Sequence[Question],
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    thinking: bool = False,
    progress: bool = True,
    prepare: Callable[[Any], None] | None = None,
    identity: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Greedy answers of the model in `folder` to questions of one's own, exact match; see `HFModel` and `evaluate`.

    `identity` is what the result says of the model's files (`models.identity_of`).
    """
    model = HFModel(folder, batch_size, thinking, progress=progress, prepare=prepare)
    model.identity = dict(identity or {})
    return evaluate(model, load_task("own"), questions, "generate", max_new_tokens, thinking=thinking)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, preset, or a server's http:// address")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="LoRA adapter beside MODEL's weights, not merged")
    parser.add_argument(
        "--task", default="own", metavar="NAME", help=f"{', '.join(names())}, or a file of your own (default: own)"
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="rows of chat, or of the task's data set; default: where the task is published",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for scores and answers")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--method", choices=METHODS, help="likeliest letter, written answer, or both (default: the task's)"
    )
    parser.add_argument(
        "--bias", action="store_true", help="ask again with options and letters moved round: letter and position bias"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer (default: from the longest expected answer)"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers to each question (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="likeliest tokens to sample from")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling, and of generated questions")
    parser.add_argument("--thinking", action="store_true", help="let the model reason first, as it was trained to")
    parser.add_argument("--plain", action="store_true", help="prompts without chat format, as base models are asked")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="questions at a time (default: 128)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; 1 is best for small models")
    parser.add_argument(
        "--ranks", metavar="FLAGS", help='letters on ranks of the recipe, by its flags: "--local --ranks 2 layout.ep=2"'
    )
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time, of a server")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for one answer of a server")
    parser.add_argument("--served-model", metavar="NAME", help="name of the model at a server that has several")
    return parser


def _questions(args: argparse.Namespace, task: Task) -> list[Question]:
    if args.questions is None and task.make is not None:
        return list(task.make(args.limit or 500, args.seed))
    source = args.questions or task.data
    if not source:
        raise UserError(f"--task {task.name} needs --questions: a file, a folder or hub:NAME@REVISION")
    return load_questions(source, args.limit, task.form)


def _check_numbers(args: argparse.Namespace) -> None:
    require_counts(args, "limit", "max_new_tokens", "batch_size", "threads", "concurrency")
    if args.bias and args.plain:
        raise UserError("--bias moves options and letters in the chat format; leave out --plain, or --bias")


def _completion(args: argparse.Namespace, task: Task) -> Callable[[Question], str] | None:
    if args.plain and task.completion is None:
        raise UserError(f"task {task.name} has no prompt without chat format; leave out --plain")
    return task.completion if args.plain else None


def _folder(args: argparse.Namespace) -> Path:
    """Where the model is. Raises `UserError` for what is no model, or cannot be asked so."""
    folder = named_model(args.model)
    if is_nemo_checkpoint(folder) and args.ranks is None:
        raise UserError(f"{folder} is a NeMo checkpoint; give --ranks, or export it with conversion/nemo_to_hf.py")
    if not is_nemo_checkpoint(folder):
        read_config(folder)
    if args.adapter is not None and not args.adapter.is_dir():
        raise UserError(f"--adapter {args.adapter} is no folder; give OUT/adapter of a run, or a PEFT adapter")
    return folder


def _on_ranks(args: argparse.Namespace, task: Task) -> Model:
    from evaluation.ranks import RankModel, by_recipe

    folder, name = _folder(args), f"{args.model} + {args.adapter}" if args.adapter else args.model
    run = by_recipe(folder, args.adapter, shlex.split(args.ranks))
    model = RankModel(folder, args.out, run, _completion(args, task), name)
    model.identity = identity_of(folder, args.adapter)
    return model


def _local_model(args: argparse.Namespace, task: Task, stack: ExitStack) -> Model:
    folder = _folder(args)
    plain = stack.enter_context(plain_folder(folder, args.out))
    name = f"{args.model} + {args.adapter}" if args.adapter else args.model
    prepare = beside(args.adapter, plain)
    model = HFModel(
        plain, args.batch_size, args.thinking, _completion(args, task), args.threads, prepare=prepare, name=name
    )
    model.identity = identity_of(folder, args.adapter)
    return model


def _server(args: argparse.Namespace) -> ServerModel:
    from evaluation.server import ServerModel

    if args.adapter or args.plain or args.ranks:
        raise UserError("--adapter, --plain and --ranks are for folders: a server has its own adapters and chat format")
    answers = args.out.with_name(args.out.name + ".answers.jsonl")
    return ServerModel(args.model, args.served_model, answers, args.timeout, args.concurrency, args.thinking)


def main() -> int:
    args = _parser().parse_args()
    _check_numbers(args)
    sampling = Sampling(args.temperature, args.top_p, args.samples, args.seed)
    sampling.check()
    remote = args.model.startswith(("http://", "https://"))
    if not remote:
        _folder(args)
    task = load_task(args.task)
    questions = _questions(args, task)
    if args.bias:
        turns_of(questions)  # refuses what cannot be turned before any work
    out = check_result_file(args.out)
    started = time.monotonic()
    with fresh_file(out) as temporary, ExitStack() as stack:  # from here on nobody else writes it
        server = _server(args) if remote else None
        model = server or (_on_ranks(args, task) if args.ranks is not None else _local_model(args, task, stack))
        result = evaluate(model, task, questions, args.method, args.max_new_tokens, sampling, args.thinking)
        if args.bias:
            result["bias"] = bias(model, questions)
        temporary.write_text(result_text(result))
    if server is not None:
        server.done()
    if args.bias:
        found = result["bias"]
        print(
            f"moved round: {found['accuracy']:.1%} right, {found['steady']:.1%} steady; the most liked letter is "
            f"{100 * found['largest_letter']:.1f} points above an even share, the most liked place "
            f"{100 * found['largest_place']:.1f}"
        )
    low, high = result["ci95"]
    others = ", ".join(f"{count} {name}" for name, count in result["outcomes"].items() if count and name != RIGHT)
    asked = result["n"] * args.samples
    print(
        f"{result['correct']} of {asked} right = {result['accuracy']:.1%} (95 %: {low:.1%} to {high:.1%})"
        f"{'; ' + others if others else ''}; {time.monotonic() - started:.0f} s; answers in {out}"
    )
    return 0


if __name__ == "__main__":
    run(main)
