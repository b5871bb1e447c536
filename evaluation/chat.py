"""Talk to a model, alone or beside another one: what a tuning changed, in your own words.

    python evaluation/chat.py MODEL [--beside OTHER]

MODEL and OTHER are Hugging Face folders or presets; `--adapter` puts an adapter beside OTHER's weights, or MODEL's when
it is alone. Your lines come from the terminal or a pipe. `/new` begins another conversation, `/quit` or Ctrl-D ends.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, require_counts, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from evaluation.generation import Sampling
from evaluation.judging.extraction import THINK_END, after_thinking
from evaluation.judging.questions import Question
from evaluation.models import HFModel, beside, plain_folder
from nano3.arch import resolve_model
from nano3.hf_config import read_config


class Talk:
    """A conversation with one model; each model's own answers are its history."""

    def __init__(self, name: str, model: HFModel, system: str) -> None:
        self.name, self.model, self.system = name, model, system
        self.messages: list[dict[str, str]] = []
        self.begin()

    def begin(self) -> None:
        """Forgets what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str, limit: int, sampling: Sampling) -> str:
        """The model's answer to `text`, thinking included where it thinks."""
        self.messages.append({"role": "user", "content": text})
        question = Question("chat", "chat", tuple(self.messages), "")
        [[written]] = self.model.answers([question], limit, sampling)
        self.messages.append({"role": "assistant", "content": after_thinking(written.text).strip()})
        shown = written.text.replace(THINK_END, f"{THINK_END}\n").strip()
        return shown if written.finished else f"{shown} … (cut at {limit} tokens; see --max-new-tokens)"


def talk(models: Sequence[Talk], limit: int, sampling: Sampling) -> None:
    """Reads lines until there are no more and prints every model's answer."""
    prompt = "you> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/new":
            for one in models:
                one.begin()
            print("(a new conversation)", flush=True)
        elif line:
            for one in models:
                print(f"{one.name}> {one.say(line, limit, sampling)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or preset")
    parser.add_argument("--beside", metavar="OTHER", help="a second model that gets the same questions")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="LoRA adapter beside the last model's weights")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--thinking", action="store_true", help="let the model reason first")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; 1 is best for small models")
    args = parser.parse_args()
    require_counts(args, "max_new_tokens", "threads")
    sampling = Sampling(args.temperature)
    sampling.check()
    names = [args.model, *([args.beside] if args.beside else [])]
    folders = [resolve_model(name) for name in names]
    for folder in folders:
        read_config(folder)
    if args.adapter is not None and not args.adapter.is_dir():
        raise UserError(f"--adapter {args.adapter} is no folder; give OUT/adapter of a run, or a PEFT adapter")
    with ExitStack() as stack:
        models = []
        for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
            plain = stack.enter_context(plain_folder(folder, Path("chat")))
            prepare = beside(args.adapter if number == len(names) - 1 else None, plain)
            model = HFModel(plain, 1, args.thinking, threads=args.threads, progress=False, prepare=prepare)
            models.append(Talk(Path(name).name, model, args.system))
        talk(models, args.max_new_tokens, sampling)
    return 0


if __name__ == "__main__":
    run(main)
