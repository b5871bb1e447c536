"""Log-probabilities of given continuations: which letter the model finds likeliest, without letting it write.

A continuation's log-probability is the sum over its tokens, each given everything before it. Where a question's
continuations differ in their last token only, as letters do, one forward pass scores them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from evaluation.generation import PAD_ID

Ids = Sequence[int]


class Scored(NamedTuple):
    """A continuation's log-probability in nats, and whether each of its tokens is the likeliest."""

    logprob: float
    greedy: bool


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, as the whole text is tokenized; spaces at the end of the context go
    over to the continuation, where tokenizers keep them (so does lm-evaluation-harness)."""
    trailing = len(context) - len(context.rstrip())
    if trailing:
        context, continuation = context[:-trailing], context[-trailing:] + continuation
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    return whole[:start], whole[start:]


def continuation_logprobs(
    model: Any,
    prompts: Sequence[Sequence[tuple[Ids, Ids]]],
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[Scored]]:
    """What each continuation of each prompt scores.

    Args:
        model: a transformers causal model.
        prompts: for each question its (context, continuation) pairs of token ids.
        batch_size: forward passes of one sequence at a time; sequences of similar length share a batch.
        progress: a bar on stderr.

    Raises:
        ValueError: a continuation or a context without tokens.
    """
    from tqdm import tqdm

    # One pass for each distinct sequence up to the last token: {sequence: [(question, place, continuation)]}.
    passes: dict[tuple[int, ...], list[tuple[int, int, tuple[int, ...]]]] = {}
    for number, pairs in enumerate(prompts):
        for place, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ValueError(f"question {number}: continuation {place} or its context has no tokens")
            passes.setdefault((*context, *continuation[:-1]), []).append((number, place, tuple(continuation)))
    result = [[Scored(0.0, False)] * len(pairs) for pairs in prompts]
    order = sorted(passes, key=len)
    with tqdm(total=len(order), desc="letters", unit="pass", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for sequence, scores in zip(chosen, _last_logprobs(model, chosen, passes), strict=True):
                for (number, place, _), score in zip(passes[sequence], scores, strict=True):
                    result[number][place] = score
            bar.update(len(chosen))
    return result


def _last_logprobs(model: Any, sequences: Sequence[Ids], passes: Any) -> list[list[Scored]]:
    """For each sequence of a batch what its continuations score. Padded on the left (`generation.py`)."""
    import torch

    width = max(map(len, sequences))
    longest = max(len(continuation) for sequence in sequences for _, _, continuation in passes[sequence])
    tokens = torch.tensor([[PAD_ID] * (width - len(one)) + list(one) for one in sequences], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in sequences], device=model.device)
    with torch.inference_mode():
        logits = model(tokens, attention_mask=mask, use_cache=False, logits_to_keep=longest).logits
    logprobs = logits.float().log_softmax(-1)
    likeliest = logprobs.argmax(-1)

    def scored(row: int, ids: Ids) -> Scored:
        places = [(row, position - len(ids)) for position in range(len(ids))]
        total = sum(float(logprobs[place][token]) for place, token in zip(places, ids, strict=True))
        return Scored(total, all(int(likeliest[p]) == token for p, token in zip(places, ids, strict=True)))

    return [[scored(row, ids) for _, _, ids in passes[sequence]] for row, sequence in enumerate(sequences)]
