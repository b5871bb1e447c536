"""Answers from a transformers model, greedy or sampled, many prompts at a time.

Batches are padded on the left. That is safe for this architecture only because transformers zeroes padded positions
before and after the Mamba convolution, so that the state is still empty when a prompt begins, and because the model has
no position embedding; tests compare batched answers with answers one by one. A sampled answer depends on its seed and
its prompt's number only, not on what shares its batch: every answer has its own stream of random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.chat_formats import NEMOTRON
from nano3.cli import UserError
from nano3.imports import uncollected

if TYPE_CHECKING:
    import torch

STOP_IDS = NEMOTRON.stop_ids
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
    with uncollected():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer("a")  # some fields are first met here
    except Exception as error:  # whatever the library meets in files that are not as it expects
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"transformers cannot load a tokenizer from {folder} ({reason}); download it again") from error
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
    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    texts = []
    for number, messages in enumerate(conversations):
        defined = list(tools[number]) if tools else []
        try:
            texts.append(tokenizer.apply_chat_template(list(messages), tools=defined or None, **settings))
        except Exception as error:  # a template is a program, and may fail in any way
            raise UserError(
                f"the model's chat template refuses question {number + 1} ({error}); remove it, or change the template"
            ) from error
    # The template has written every special token that belongs there. Of no text transformers' tokenizers raise.
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen. With a `temperature` of 0 the likeliest token is taken, and one sample is all there is.

    `top_p` keeps the likeliest tokens that together have at least this probability; `samples` answers each prompt.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0

    def check(self) -> None:
        """Raises `UserError` for values that mean nothing."""
        if not 0 <= self.temperature <= 10:
            raise UserError(f"--temperature is {self.temperature}; give a number from 0 (greedy) to 10")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; give a number above 0, at most 1")
        if self.samples < 1:
            raise UserError(f"--samples is {self.samples}; it must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--samples {self.samples} needs --temperature above 0: greedy samples are all the same")


GREEDY = Sampling()


def write_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 128,
    progress: bool = True,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = STOP_IDS,
) -> list[list[Answer]]:
    """The model's answers to each prompt, `sampling.samples` of them, in the order of `prompts`.

    An answer ends at the first of `stop_ids` or after `max_new_tokens`. Prompts of similar length share a batch.
    `progress` shows a bar on stderr.
    """
    from tqdm import tqdm

    jobs = [(number, sample) for number in range(len(prompts)) for sample in range(sampling.samples)]
    jobs.sort(key=lambda job: len(prompts[job[0]]))
    answers: dict[tuple[int, int], Answer] = {}
    with tqdm(total=len(jobs), desc="answers", unit="answer", disable=not progress) as bar:
        for start in range(0, len(jobs), batch_size):
            chosen = jobs[start : start + batch_size]
            noise = [_Noise(sampling, job) for job in chosen] if sampling.temperature else None
            tokens = _generate(model, [prompts[number] for number, _ in chosen], max_new_tokens, noise, stop_ids)
            answers.update((job, _cut(row, stop_ids)) for job, row in zip(chosen, tokens, strict=True))
            bar.update(len(chosen))
    return [[answers[number, sample] for sample in range(sampling.samples)] for number in range(len(prompts))]


class _Noise:
    """One answer's stream of random numbers. Adding Gumbel noise to log-probabilities and taking the largest samples
    from them (Gumbel 1954), so that the generation itself stays greedy."""

    def __init__(self, sampling: Sampling, job: tuple[int, int]) -> None:
        import numpy as np

        self.sampling, self.stream = sampling, np.random.default_rng([sampling.seed, *job])

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (vocabulary,) of the next token -> what the largest of is the sampled token."""
        import torch

        logprobs = (scores.float() / self.sampling.temperature).log_softmax(-1)
        if self.sampling.top_p < 1:
            ordered, places = logprobs.sort(descending=True)
            before = ordered.exp().cumsum(-1) - ordered.exp()
            logprobs[places[before >= self.sampling.top_p]] = -torch.inf
        return logprobs + torch.from_numpy(self.stream.gumbel(size=len(scores))).to(logprobs)


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    noise: Sequence[_Noise] | None,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """New tokens of each prompt (rows padded on the right behind a stop token); one batch."""
    import torch
    from transformers import GenerationConfig

    def noisy(_tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.stack([one(row) for one, row in zip(noise or (), scores, strict=True)])

    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[PAD_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=PAD_ID
    )
    with torch.inference_mode():
        result = model.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=[noisy] if noise else None,
        )
    return result[:, width:].tolist()


def _cut(tokens: list[int], stop_ids: Sequence[int]) -> Answer:
    """The tokens before the first stop token."""
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return Answer(tuple(tokens[:position]), True)
    return Answer(tuple(tokens), False)
