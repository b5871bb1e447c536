"""Letters of a model on ranks: a NeMo checkpoint, with an adapter or without, in Megatron-Core and in any layout.

The prompt with each letter is a document of a token store of which the letter alone counts, and a source of its own.
So the validation loss of a source is the letter's log-probability, and a recipe's --eval-only is all that runs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.packing import build_packs
from data_prep.store import StoreWriter
from data_prep.tokens import ChatTokenizer
from evaluation.generation import Sampling
from evaluation.judging.questions import Question
from evaluation.models import Written
from evaluation.prompts import Pair, Prompts
from nano3.arch import is_nemo_checkpoint
from nano3.cli import UserError
from nano3.documents import NotNegative, check, read_json
from nano3.outputs import fresh_output, scratch_folder
from nano3.token_store import KIND, TokenStore

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "nemotron_lora.py"
RESULTS = Path("evaluation") / "results.json"
"""In the recipe's OUT (finetune/eval_only.py)."""
PAD_MULTIPLE = 16
"""Of a document in its pack: what context parallelism asks for, up to 8 ranks."""
SHORTEST = 1024
"""Tokens of a pack at least."""

Evaluate = Callable[[Path, int, Path], None]
"""A token store with packs of a length, and the folder in which RESULTS is when it returns."""


class RankModel:
    """As `evaluation.models.Model`, for letters.

    Args:
        folder: NeMo checkpoint or Hugging Face folder.
        near: path beside which there is room for what is needed meanwhile.
        completion: prompts without chat format, by question.
        evaluate: computes the losses (`by_recipe`).
        name: what results call it.
    """

    scores_letters = True

    def __init__(
        self,
        folder: Path,
        near: Path,
        evaluate: Evaluate,
        completion: Callable[[Question], str] | None = None,
        name: str = "",
    ) -> None:
        self.side = folder / "hf" if is_nemo_checkpoint(folder) else folder
        self.prompts = Prompts(self.side, completion=completion)
        self.near, self.evaluate, self.name = near, evaluate, name or str(folder)
        self.identity: dict[str, str] = {}

    def letters(self, questions: Sequence[Question]) -> list[list[float]]:
        """As `Model.letters`. Raises `UserError` where the recipe fails or has no loss of a letter."""
        pairs = self.prompts.letter_pairs(questions)
        with scratch_folder(self.near) as scratch:
            store, out = scratch / "store", scratch / "out"
            seq_length = write_store(pairs, store, ChatTokenizer(self.side))
            self.evaluate(store, seq_length, out)
            losses = read_json(out / RESULTS, dict[str, Any], "look at the recipe's messages above")
        return [
            [-self._loss(losses, number, place) * len(ids) for place, (_, ids) in enumerate(several)]
            for number, several in enumerate(pairs)
        ]

    def _loss(self, losses: dict[str, Any], number: int, place: int) -> float:
        name = f"validation_loss/{_source(number, place)}"
        return float(check(losses.get(name), NotNegative, name, "the recipe gave no loss of this letter"))

    def answers(self, questions: Sequence[Question], limit: int, sampling: Sampling) -> list[list[Written]]:
        """Ranks write nothing. Raises `UserError`."""
        raise UserError(
            f"{len(questions)} questions, {sampling.samples} answers of {limit} tokens to each: ranks score letters "
            "only; say --method letters, or export the model with conversion/nemo_to_hf.py"
        )

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As `Model.count_tokens`."""
        return self.prompts.count_tokens(texts)

    def hashes(self) -> dict[str, str]:
        """As `Model.hashes`."""
        return self.prompts.hashes()

    def facts(self) -> dict[str, Any]:
        """As `Model.facts`."""
        return {"device": "ranks", "thinking": False, "chat_format": self.prompts.completion is None}


def write_store(pairs: Sequence[Sequence[Pair]], folder: Path, tokenizer: ChatTokenizer) -> int:
    """Writes the token store of prompts with their letters, packed; returns the length of its packs."""
    with fresh_output(folder, KIND) as work:
        writer = StoreWriter(work)
        for number, several in enumerate(pairs):
            for place, (context, ids) in enumerate(several):
                tokens = np.array([*context, *ids])
                writer.add(tokens, (np.arange(len(tokens)) >= len(context)).astype(np.uint8), _source(number, place))
        writer.finish(tokenizer)
        longest = writer.longest
    seq_length = max(SHORTEST, -(-longest // SHORTEST) * SHORTEST)
    build_packs(TokenStore(folder), seq_length, PAD_MULTIPLE)
    return seq_length


def _source(number: int, place: int) -> str:
    return f"{number}-{place}"


def by_recipe(folder: Path, adapter: Path | None, flags: Sequence[str]) -> Evaluate:
    """Runs the recipe on ranks; `flags` are its own, such as --local --ranks 2 layout.ep=2."""

    def evaluate(store: Path, seq_length: int, out: Path) -> None:
        command = [sys.executable, str(RECIPE), "--eval-only", "--model", str(folder), "--validation", str(store)]
        command += ["--adapter", str(adapter or "none"), "--out", str(out), *flags]
        command += [f"train.seq_length={seq_length}", f"train.pad_multiple={PAD_MULTIPLE}"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode or not (out / RESULTS).is_file():
            raise UserError("the recipe scored nothing, see above; give its flags with --ranks")

    return evaluate
