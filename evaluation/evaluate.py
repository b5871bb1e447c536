"""Scores a Hugging Face model folder on held-out questions, with plain transformers and none of our model code.

    python evaluation/evaluate.py MODEL_DIR --questions held.jsonl --out result.json

Answers are greedy. One is right when it equals the expected answer (see `evaluation.score.normalize`) and ended by
itself within the tokens allowed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.questions import Question, load_questions
from evaluation.score import is_correct, wilson_interval
from nano3.arch import resolve_model
from nano3.cli import UserError, fresh_file, run
from nano3.hf_config import FP8_ACTIVATIONS, read_config

THINK_END = "</think>"
KIND = "evaluation-result"
"""Marks our result files: a second run may replace one, and never somebody else's file."""


def evaluate_model(
    folder: Path | str,
    questions: Sequence[Question],
    max_new_tokens: int = 40,
    batch_size: int = 128,
    thinking: bool = False,
    threads: int = 1,
    progress: bool = True,
    prepare: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Scores the model in `folder` (FP32 on the CPU, BF16 on a GPU) and returns the result that `main` writes.

    Fields: n, correct, accuracy, ci95 (Wilson), unfinished (answers cut at `max_new_tokens`), by_source, seconds,
    settings, and answers: one row per question with its text, the expected and the given answer. With `thinking` the
    model reasons first, and what follows its `</think>` is the answer; ask in the mode that was trained. `threads` is
    PyTorch's number of CPU threads for the whole process; more than one slows small models down. `prepare` is called
    with the loaded model, to change it first.
    """
    import torch
    from transformers.utils import logging

    from evaluation.generation import encode_prompts, greedy_answers, load_tokenizer
    from evaluation.hf_model import load_reference

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    start = time.monotonic()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = load_tokenizer(str(folder))
    asked, tools = [question.messages for question in questions], [question.tools for question in questions]
    prompts = encode_prompts(tokenizer, asked, thinking, tools)
    model = load_reference(folder, dtype).to(device)
    if prepare is not None:
        prepare(model)
    answers = greedy_answers(model, prompts, max_new_tokens, batch_size, progress)
    rows: list[dict[str, Any]] = []
    for question, answer in zip(questions, answers, strict=True):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        text, finished = final_answer(text, answer.finished, thinking)
        rows.append(
            {
                "id": question.id,
                "source": question.source,
                "question": question.text,
                "expected": question.answer,
                "answer": text,
                "correct": finished and is_correct(text, question.answer),
                "finished": finished,
            }
        )
    correct = sum(row["correct"] for row in rows)
    return {
        "kind": KIND,
        "model": str(folder),
        **_summary(correct, len(rows)),
        "unfinished": sum(not row["finished"] for row in rows),
        "by_source": _by_source(rows),
        "seconds": round(time.monotonic() - start, 2),
        "settings": {
            "max_new_tokens": max_new_tokens,
            "thinking": thinking,
            "device": device,
            "dtype": str(dtype),
            "greedy": True,
            "fp8_activations": (Path(folder) / FP8_ACTIVATIONS).exists(),
        },
        "answers": rows,
    }


def final_answer(text: str, finished: bool, thinking: bool) -> tuple[str, bool]:
    """The answer in what the model said, and whether it came to an end: reasoning that never ended gave no answer."""
    if not thinking:
        return text, finished
    _, end, answer = text.rpartition(THINK_END)
    return answer, finished and bool(end)


def _summary(correct: int, n: int) -> dict[str, Any]:
    return {"n": n, "correct": correct, "accuracy": correct / n, "ci95": list(wilson_interval(correct, n))}


def _by_source(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, list[bool]] = {}
    for row in rows:
        grouped.setdefault(row["source"], []).append(row["correct"])
    return {source: _summary(sum(flags), len(flags)) for source, flags in sorted(grouped.items())}


def check_result_file(out: Path) -> Path:
    """Refuses a result path that is a folder or another program's file."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file name such as {out / 'result.json'}")
    if out.exists():
        try:
            ours = json.loads(out.read_text())["kind"] == KIND
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise UserError(f"--out {out} exists and is not a result of this script; choose another name or remove it")
    return out


def write_result(result: dict[str, Any], out: Path) -> None:
    """Writes the result whole or not at all."""
    with fresh_file(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Scores a Hugging Face model folder on held-out questions: greedy answers, exact match.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="Hugging Face folder, or pico")
    parser.add_argument("--questions", type=Path, required=True, help="chat JSONL; the last message is the answer")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for scores and answers")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="longest answer in tokens")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="questions at a time")
    parser.add_argument("--thinking", action="store_true", help="let the model reason first, as it was trained to")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; 1 is best for small models")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    for name in ("max_new_tokens", "batch_size", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    folder = resolve_model(args.model)
    read_config(folder)
    questions = load_questions(args.questions, args.limit)
    out = check_result_file(args.out)
    result = evaluate_model(folder, questions, args.max_new_tokens, args.batch_size, args.thinking, args.threads)
    write_result(result, out)
    low, high = result["ci95"]
    print(
        f"{result['correct']} of {result['n']} right = {result['accuracy']:.1%} (95 %: {low:.1%} to {high:.1%}); "
        f"{result['unfinished']} unfinished; {result['seconds']} s; answers in {out}"
    )
    return 0


if __name__ == "__main__":
    run(main)
