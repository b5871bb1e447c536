"""How questions become tokens: by the model's own chat template, or by a task's prompt without chat format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.chat_formats import format_of
from evaluation.judging.questions import Question
from nano3.row_keys import LETTERS

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of what follows it."""


def sha256_of(*texts: str) -> str:
    """One hash over texts, their borders included."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


class Prompts:
    """The prompts of a model, which remembers what was asked.

    Args:
        folder: with the tokenizer and its chat template.
        thinking: whether prompts open the model's reasoning.
        completion: prompts without chat format, by question.
    """

    def __init__(
        self, folder: Path | str, thinking: bool = False, completion: Callable[[Question], str] | None = None
    ) -> None:
        from evaluation.generation import load_tokenizer

        self.tokenizer: Any = load_tokenizer(str(folder))
        self.thinking, self.completion = thinking, completion
        self._asked: list[str] = []

    def encoded(self, questions: Sequence[Question], thinking: bool) -> list[list[int]]:
        """Token ids of each question up to where the answer begins."""
        from evaluation.generation import encode_prompts

        if self.completion is not None:
            texts = [self.completion(question) for question in questions]
            prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        else:
            asked, tools = [question.messages for question in questions], [question.tools for question in questions]
            prompts = encode_prompts(self.tokenizer, asked, thinking, tools)
        self._asked.append(sha256_of(*(" ".join(map(str, prompt)) for prompt in prompts)))
        return prompts

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end the model's turn, by the tokenizer's chat format."""
        return format_of(self.tokenizer.backend_tokenizer).stop_ids

    def letter_pairs(self, questions: Sequence[Question]) -> list[list[Pair]]:
        """For each question the prompt with each of its letters. In chat format the letter begins the answer, without
        reasoning before it; without it a space and the letter follow."""
        from evaluation.letters import encode_pair

        prompts = self.encoded(questions, thinking=False)
        pairs: list[list[Pair]] = []
        for question, prompt in zip(questions, prompts, strict=True):
            names = LETTERS[: len(question.choices)]
            if self.completion is not None:
                text = self.completion(question)
                pairs.append([encode_pair(self.tokenizer, text, f" {name}") for name in names])
            else:
                own = self.tokenizer(list(names), add_special_tokens=False)["input_ids"]
                pairs.append([(prompt, ids) for ids in own])
        return pairs

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the texts have."""
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    def hashes(self) -> dict[str, str]:
        """`prompts` and `template` of what was asked so far."""
        template = "no chat format" if self.completion is not None else str(self.tokenizer.chat_template)
        return {"prompts": sha256_of(*self._asked), "template": sha256_of(template)}
