"""Pretrains `pico`, the small model of Nemotron-3-Nano's architecture that everything here is proved on.

    python pico/pretrain.py --out runs/pico

Full-parameter training with plain transformers, not NeMo: one process on one core, with a Mamba scan written for short
sequences, made 4,500 tokens per CPU-second in the committed run, and stock transformers takes twice as long a step.
No part of the LoRA recipe depends on how pico came to be. The committed model in nano3/presets/pico was made by this
script; its README has the command and the curve.

The loss is the mean over the examples of a batch of the mean cross-entropy of an example's answer, so that a one-digit
answer counts as much as a long one. Experts are balanced as in the real model's training: the router's correction
bias goes up by a fixed step for experts with less than their share of a batch's tokens and down for the others.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import check_output, fresh_output
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.chat import render
from data_prep.overlap import HeldOut
from pico import tasks as pico_tasks

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

KIND = "hf-checkpoint"
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
BATCH_TOKENS = 1400
POOL = 256
BIAS_STEP = 1e-3
EVALUATE_EVERY = 250
HELD_OUT = 500
HELD_OUT_SEED = 1000
IGNORED = -100

Example = tuple[list[int], list[int]]
"""Token ids, and the labels of the same length: the token itself where the model wrote it, `IGNORED` elsewhere."""


def encode(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Example:
    """A conversation as input tokens and next-token labels; the last token has no successor and is dropped."""
    tokens: list[int] = []
    labels: list[int] = []
    for segment in render(messages, thinking=False):
        ids = tokenizer.encode(segment.text).ids
        tokens += ids
        labels += ids if segment.supervised else [IGNORED] * len(ids)
    return tokens[:-1], labels[1:]


def held_out_rows() -> dict[str, list[dict[str, Any]]]:
    """`HELD_OUT` rows of every pretraining task; training leaves out their questions and near-duplicates of them."""
    return {name: pico_tasks.rows(task, HELD_OUT, HELD_OUT_SEED) for name, (task, _) in pico_tasks.PRETRAINING.items()}


def mixture(tokenizer: Tokenizer, seed: int, held_out: dict[str, list[dict[str, Any]]]) -> Iterator[Example]:
    """Endless examples of all pretraining tasks, mixed by their shares, none of them held out."""
    rng = random.Random(seed)
    names = list(pico_tasks.PRETRAINING)
    shares = [share for _, share in pico_tasks.PRETRAINING.values()]
    streams = {name: pico_tasks.endless_rows(task, seed) for name, (task, _) in pico_tasks.PRETRAINING.items()}
    excluded = {name: HeldOut(pico_tasks.conversations(rows)) for name, rows in held_out.items()}
    while True:
        name = rng.choices(names, shares)[0]
        row = next(streams[name])
        if not excluded[name].match(row["messages"][0]["content"]):
            yield encode(tokenizer, row["messages"])


def batches(examples: Iterator[Example], seed: int) -> Iterator[list[Example]]:
    """Endless batches of at most `BATCH_TOKENS` padded tokens.

    Examples of similar length share a batch, which halves the padding; the batches of a pool come in random order.
    """
    rng = random.Random(seed)
    while True:
        pool = sorted(itertools.islice(examples, POOL), key=lambda example: len(example[0]))
        cut: list[list[Example]] = [[]]
        for example in pool:
            if len(example[0]) * (len(cut[-1]) + 1) > BATCH_TOKENS:
                cut.append([])
            cut[-1].append(example)
        rng.shuffle(cut)
        yield from cut


def collate(batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Right-padded (b, l) tokens and labels."""
    import torch

    longest = max(len(tokens) for tokens, _ in batch)
    tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in batch])
    return tokens, labels


def example_losses(model: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per example the mean cross-entropy of its answer tokens, and whether greedy decoding would give the answer.

    Greedy decoding reproduces an answer exactly when, with the answer itself as context, every one of its tokens is
    the most likely one: one forward pass replaces generation.
    """
    import torch.nn.functional as F

    logits = model(tokens, use_cache=False).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    counted = labels != IGNORED
    right = ((logits.argmax(-1) == labels) | ~counted).all(-1)
    return losses.sum(-1) / counted.sum(-1), right


def accuracies(model: nn.Module, held_out: dict[str, list[Example]], count: int) -> dict[str, float]:
    """Share of the first `count` held-out questions of each task that greedy decoding answers exactly."""
    import torch

    scores = {}
    with torch.no_grad():
        for name, examples in held_out.items():
            right = 0
            for start in range(0, count, 50):
                right += int(example_losses(model, *collate(examples[start : min(start + 50, count)]))[1].sum())
            scores[name] = right / count
    return scores


def balance_experts(model: nn.Module) -> None:
    """Makes every router move its correction bias after each forward pass of training (DeepSeek-V3's rule)."""
    import torch

    from pico.model import routers

    def nudge(router: Any, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            load = torch.bincount(outputs[2].flatten(), minlength=router.num_experts).float()
            router.e_score_correction_bias += BIAS_STEP * torch.sign(load.mean() - load)

    for router in routers(model):
        router.register_forward_hook(nudge)


def learning_rate(step: int, done: float) -> float:
    """Linear warm-up over `WARMUP_STEPS`, then linear to 2 % of the peak as `done` (0 to 1) grows."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - 0.98 * done)


def train(
    model: nn.Module, stream: Iterator[list[Example]], held_out: dict[str, list[Example]], budget: int
) -> list[dict[str, Any]]:
    """Trains `model` in place on `budget` tokens (padding not counted) and returns the curve."""
    import torch
    from tqdm import tqdm

    balance_experts(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    curve: list[dict[str, Any]] = []
    recent: list[float] = []
    seen = step = 0
    bar = tqdm(total=budget, unit="token", unit_scale=True, desc="pretraining pico")
    while seen < budget:
        batch = next(stream)
        optimizer.param_groups[0]["lr"] = learning_rate(step, seen / budget)
        loss = example_losses(model, *collate(batch))[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count = sum(len(tokens) for tokens, _ in batch)
        seen, step = seen + count, step + 1
        recent.append(loss.item())
        bar.update(count)
        if step % EVALUATE_EVERY == 0 or seen >= budget:
            scores = accuracies(model, held_out, 100)
            entry = {"step": step, "tokens": seen, "loss": round(sum(recent) / len(recent), 4), "accuracy": scores}
            curve.append(entry)
            recent = []
            bar.set_postfix_str(f"loss {entry['loss']:.3f} " + " ".join(f"{k} {v:.2f}" for k, v in scores.items()))
    bar.close()
    return curve


def describe(
    args: argparse.Namespace, seconds: float, curve: list[dict[str, Any]], final: dict[str, float]
) -> dict[str, Any]:
    """What curve.json holds: how the model was made, the curve, and the accuracy of the exported model."""
    import torch
    import transformers

    return {
        "command": f"python pico/pretrain.py --tokens {args.tokens} --seed {args.seed}",
        "cpu_seconds": round(seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "held_out_questions_per_task": HELD_OUT,
        "final_accuracy": final,
        "curve": curve,
    }


def main() -> int:
    """Trains, exports, and measures the exported folder as plain transformers loads it."""
    parser = argparse.ArgumentParser(
        description="Pretrain pico, the small model of this architecture, on one CPU core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the Hugging Face checkpoint")
    parser.add_argument("--tokens", default=3_400_000, type=int, help="tokens to train on, padding not counted")
    parser.add_argument("--seed", default=1, type=int, help="seed of the weights and of the training examples")
    args = parser.parse_args()
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens} must be at least 1")
    check_output(args.out, KIND)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from evaluation.hf_model import load_reference
    from pico.model import build_model, export
    from pico.tokenizer import build_tokenizer, save_tokenizer

    torch.set_num_threads(1)  # more threads are slower on matrices this small
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    rows = held_out_rows()
    held_out = {name: [encode(tokenizer, row["messages"]) for row in rows[name]] for name in rows}
    model = build_model()
    started = time.process_time()
    curve = train(model, batches(mixture(tokenizer, args.seed, rows), args.seed), held_out, args.tokens)
    seconds = time.process_time() - started
    with fresh_output(args.out, KIND) as folder:
        export(model, folder)
        save_tokenizer(folder)
        final = accuracies(load_reference(folder, torch.float32), held_out, HELD_OUT)
        (folder / "curve.json").write_text(json.dumps(describe(args, seconds, curve, final), indent=1) + "\n")
    print(
        f"{args.out}: {args.tokens} tokens in {seconds / 60:.1f} CPU-minutes; held-out accuracy of the exported model:"
    )
    for name, score in final.items():
        print(f"  {name:16} {score:.3f}")
    return 0


if __name__ == "__main__":
    run(main)
