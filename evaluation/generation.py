"""Greedy answers from a transformers model, many prompts at a time.

Batches are padded on the left. That is safe for this architecture only because transformers zeroes padded positions
before and after the Mamba convolution, so that the state is still empty when a prompt begins, and because the model has
no position embedding; tests/evaluation/test_evaluation.py compares batched answers with answers one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nano3.cli import UserError

STOP_IDS = (2, 11)
"""`</s>` and `<|im_end|>`, the tokens that end a turn of Nemotron-3-Nano and of pico."""
PAD_ID = 0
"""Fills the left of a batch; masked, so that its value does not matter."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote: token ids without the stop token, and whether it stopped by itself."""

    tokens: tuple[int, ...]
    finished: bool


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a Hugging Face folder. Raises `UserError` when there is none or it has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load a tokenizer from {folder}: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {folder} has no chat template; use a post-trained model's tokenizer files")
    return tokenizer


def encode_prompts(
    tokenizer: Any,
    conversations: Sequence[Sequence[dict[str, Any]]],
    thinking: bool = False,
    tools: Sequence[Sequence[dict[str, Any]]] | None = None,
) -> list[list[int]]:
    """Token ids of each conversation up to where the model's turn begins, by the tokenizer's own chat template.

    `tools` are the definitions that each conversation has. Raises `UserError` where the template refuses one.
    """
    from jinja2 import TemplateError

    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    texts = []
    for number, messages in enumerate(conversations):
        defined = list(tools[number]) if tools else []
        try:
            texts.append(tokenizer.apply_chat_template(list(messages), tools=defined or None, **settings))
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"the model's chat template refuses question {number + 1} ({error}); remove it, or change the template"
            ) from error
    # The template has written every special token that belongs there.
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def greedy_answers(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int = 40, batch_size: int = 128, progress: bool = True
) -> list[Answer]:
    """The model's most likely continuation of each prompt, in the order of `prompts`.

    Ends at the first of `STOP_IDS` or after `max_new_tokens`. Prompts of similar length share a batch. `progress`
    shows a bar on stderr.
    """
    from tqdm import tqdm

    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: dict[int, Answer] = {}
    with tqdm(total=len(prompts), desc="answers", unit="question", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            tokens = _generate(model, [prompts[number] for number in chosen], max_new_tokens)
            answers.update((number, _cut(row)) for number, row in zip(chosen, tokens, strict=True))
            bar.update(len(chosen))
    return [answers[number] for number in range(len(prompts))]


def _generate(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """New tokens of each prompt (rows padded on the right behind a stop token); one batch."""
    import torch
    from transformers import GenerationConfig

    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[PAD_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(STOP_IDS), pad_token_id=PAD_ID
    )
    with torch.inference_mode():
        result = model.generate(
            tokens.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )  # fmt: skip
    return result[:, width:].tolist()


def _cut(tokens: list[int]) -> Answer:
    """The tokens before the first stop token."""
    for position, token in enumerate(tokens):
        if token in STOP_IDS:
            return Answer(tuple(tokens[:position]), True)
    return Answer(tuple(tokens), False)
