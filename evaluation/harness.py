"""Our models behind lm-evaluation-harness: its tasks, our way to load and to batch.

    python evaluation/harness.py MODEL --tasks arc_easy --out harness.json [--adapter DIR] [--include FOLDER]

`--include` is a folder of task files of your own, whose data may be local files: nothing needs a network then.
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
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from evaluation.generation import write_answers
from evaluation.letters import continuation_logprobs, encode_pair
from evaluation.models import HFModel, beside, plain_folder
from nano3.arch import resolve_model
from nano3.hf_config import read_config

KIND = "harness-result"
LONGEST = 256
"""Tokens of a generated answer where a task does not say."""


def harness_model(model: HFModel) -> Any:
    """A loaded model as lm-evaluation-harness' `LM`. Raises `UserError` without the package."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed: pip install lm-eval==0.4.13") from None

    class OurModel(LM):
        """Log-likelihoods and greedy answers by our own code."""

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            """Sum of the continuation's log-probabilities in nats, and whether greedy decoding would write it."""
            first = str(model.tokenizer.decode([model.tokenizer.eos_token_id]))  # stands before an empty context
            pairs = [[encode_pair(model.tokenizer, one.args[0] or first, one.args[1])] for one in requests]
            found = continuation_logprobs(model.model, pairs, model.batch_size, model.progress)
            return [(one.logprob, one.greedy) for [one] in found]

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            """The whole text after an end-of-text token, in one window."""
            ids = model.tokenizer([one.args[0] for one in requests], add_special_tokens=False)["input_ids"]
            pairs = [[([model.tokenizer.eos_token_id], text)] for text in ids]
            found = continuation_logprobs(model.model, pairs, model.batch_size, model.progress)
            return [one.logprob for [one] in found]

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            """Greedy answers, cut before the first of the task's stop texts."""
            settings = [one.args[1] for one in requests]
            limit = max((int(one.get("max_gen_toks") or LONGEST) for one in settings), default=LONGEST)
            prompts = model.tokenizer([one.args[0] for one in requests], add_special_tokens=False)["input_ids"]
            stops = model.prompts.stop_ids
            answers = write_answers(model.model, prompts, limit, model.batch_size, model.progress, stop_ids=stops)
            texts = [model.tokenizer.decode(answer.tokens, skip_special_tokens=True) for [answer] in answers]
            return [_cut(text, one.get("until") or []) for text, one in zip(texts, settings, strict=True)]

    return OurModel()


def _cut(text: str, until: str | list[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or preset")
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="lm-evaluation-harness' tasks, with commas")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for what it reports")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="LoRA adapter beside MODEL's weights")
    parser.add_argument("--include", type=Path, metavar="FOLDER", help="task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences at a time (default: 32)")
    args = parser.parse_args()
    require_counts(args, "limit", "batch_size")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; give a file name")
    if args.adapter is not None and not args.adapter.is_dir():
        raise UserError(f"--adapter {args.adapter} is no folder; give OUT/adapter of a run, or a PEFT adapter")
    folder = resolve_model(args.model)
    read_config(folder)
    with fresh_file(args.out) as temporary, ExitStack() as stack:  # from here on nobody else writes it
        plain = stack.enter_context(plain_folder(folder, args.out))
        model = HFModel(plain, args.batch_size, prepare=beside(args.adapter, plain), name=args.model)
        found = _evaluated(harness_model(model), args.tasks.split(","), args.include, args.limit)
        temporary.write_text(json.dumps({"kind": KIND, "model": args.model, "results": found}, indent=1) + "\n")
    for name, metrics in found.items():
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        print(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in numbers.items())}")
    return 0


def _evaluated(model: Any, tasks: list[str], include: Path | None, limit: int | None) -> dict[str, Any]:
    # Python puts a script's own folder first, and the package `evaluate` that lm_eval imports is not our evaluate.py.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-evaluation-harness has no task {unknown[0]!r}; see `lm_eval ls tasks`, or give --include")
    found: Any = simple_evaluate(model=model, tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    return dict(found["results"])


if __name__ == "__main__":
    run(main)
