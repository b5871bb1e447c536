"""Scores of a small model on a recipe's own questions: the base, the tuned one, what PEFT makes of a submission."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluation.comparison import Line, accuracy, by_groups, grouped, paired, table
from evaluation.evaluate import evaluate
from evaluation.judging.questions import load_questions
from evaluation.models import HFModel, beside
from evaluation.result_file import Result, write_result
from evaluation.tasks import load_task
from nano3.outputs import scratch_folder

Prepare = Callable[[Any], Any]
"""What changes a loaded model before it is asked."""


def score(
    base: Path,
    questions: Path,
    task: str,
    out: Path,
    *,
    thinking: bool = False,
    prepare: Prepare | None = None,
    batch_size: int = 128,
) -> Result:
    """Greedy answers of `base`, changed by `prepare`, judged by the task and written to `out`.

    Answers may have a quarter and eight tokens more than the longest expected one: small models learn to answer as
    shortly as their training data, and a base that rambles would take an hour. `batch_size`: sequences at a time.
    """
    asked = load_questions(questions, form=load_task(task).form)
    model = HFModel(base, batch_size, thinking, prepare=prepare, name=out.stem)
    texts = [question.written + (question.reasoning if thinking else "") for question in asked]
    limit = math.ceil(1.25 * max(model.count_tokens(texts))) + 8
    method = "both" if all(question.choices for question in asked) else "generate"
    result = evaluate(model, load_task(task), asked, method, limit, thinking=thinking)
    write_result(result, out)
    return result


def score_both(
    base: Path, adapter: Path, questions: Path, task: str, out: Path, *, thinking: bool = False, batch_size: int = 128
) -> list[Result]:
    """The base and the base with the adapter beside its weights: OUT/scores-base.json and OUT/scores.json."""
    out.mkdir(exist_ok=True)
    results = []
    for name, chosen in (("scores-base.json", None), ("scores.json", adapter)):
        prepare = beside(chosen, base)
        results.append(
            score(base, questions, task, out / name, thinking=thinking, prepare=prepare, batch_size=batch_size)
        )
    return results


@contextmanager
def peft_of(submission: Path) -> Iterator[Prepare]:
    """What makes PEFT put the adapter of a submission's zip into a loaded model, while its files are unpacked."""
    from peft import PeftModel

    from conversion.submission import unpack

    with scratch_folder(submission.with_suffix("")) as folder:
        unpack(submission, folder)
        yield lambda model: PeftModel.from_pretrained(model, str(folder))


def reasoning_report(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Scores OUT/held_out.jsonl with thinking, OUT/old_tasks.jsonl without; prints both tables, writes OUT/report.json.

    A base that never learned to think is asked without thinking too. The gain is over the better of its two forms, so
    that learning the form alone is no gain. Results: OUT/thinking, OUT/plain and OUT/old.
    """
    asked = out / "held_out.jsonl"
    thinking, tuned = score_both(base, adapter, asked, "own", out / "thinking", thinking=True)
    (out / "plain").mkdir(exist_ok=True)
    plain = score(base, asked, "own", out / "plain" / "scores-base.json")
    better = max(("thinking", thinking), ("plain", plain), key=lambda one: accuracy(one[1]))
    pair = paired(better[1], tuned)
    before, after = score_both(base, adapter, out / "old_tasks.jsonl", "own", out / "old")
    tasks, old = grouped(better[1], tuned, "source"), by_groups(before, after, "source")
    print(f"\nheld out, the base in its better form ({better[0]}), tuned with thinking:\n{table(tasks)}")
    print(f"\nold tasks, what was forgotten:\n{table(old)}\n")
    report = {
        "n": pair.n,
        "base_thinking": accuracy(thinking),
        "base_plain": accuracy(plain),
        "base_better": f"base_{better[0]}",
        "tuned_accuracy": accuracy(tuned),
        "gain": pair.gain,
        "ci95_gain": list(pair.interval),
        "tasks": {line.name: _gain_of(line) for line in tasks},
        "forgetting": {line.name: _gain_of(line) for line in old},
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _gain_of(line: Line) -> dict[str, Any]:
    """A group's line for report.json."""
    return {
        "n": line.pair.n,
        "base": line.before.accuracy,
        "tuned": line.after.accuracy,
        "ci95_gain": list(line.pair.interval),
    }
