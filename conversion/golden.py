"""Golden answers of an exported model: what a server that reads the folder right must answer.

    python conversion/golden.py DIR [--prompts FILE] [--unquantized MERGED] [--out FILE]

DIR is a Hugging Face folder, merged or in FP8. Its log-probability of every token of a few prompts is computed in FP32
by transformers' code, layer by layer, so that one layer of weights is all that must fit in memory (5.2 GB at most for
Nano); of an FP8 folder with weights, activations and cache rounded as a server rounds them. The same in BF16 shows what
rounding alone does to this model on these prompts. The same without rounded activations, and of the folder that DIR was
made from (--unquantized), are what a server must not answer. Then faults are planted: the last lines say which of them
the prompts show, and so what a pass does not show. conversion/check_server.py compares a running server with the file.

The file of prompts has a JSON object with `messages` (chat JSONL) or `prompt` (plain text) a line; without it a few
texts of our own are taken. Prompts of what the model was tuned for tell more. The output must not lie in the model's
folder, where servers load every *.safetensors.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from conversion.certificates.certificate_json import read_certificate
from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import CERTIFICATE
from conversion.checkpoint.safetensors_layout import FP8
from conversion.checkpoint.tensor_digests import content_hash, facts_of
from conversion.fp8.golden_file import Golden
from conversion.fp8.golden_passes import Way, answers, planted
from conversion.fp8.golden_verdict import Limits, differences, problems, unseen
from nano3.arch import resolve_model
from nano3.documents import json_lines

LONGEST = 4096
"""Tokens of a prompt at most: vLLM keeps the log-probabilities of a whole prompt in memory."""
UNROUNDED, UNQUANTIZED = "activations not in FP8", "weights not in FP8"
"""What the other models of an FP8 folder's file have."""

TEXTS = (
    "The capital of France is Paris, the capital of Italy is Rome, and the capital of Japan is Tokyo.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(2, 3))  # 5\n",
    "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97",
    "Water boils at 100 degrees Celsius at sea level; on a high mountain the pressure is lower, so it boils sooner.",
)
QUESTIONS = (
    ("Sort these numbers in ascending order: 31, 4, 15, 92, 65", "4, 15, 31, 65, 92"),
    ("What is 12 times 12?", "144"),
    ("Name three primary colours.", "Red, yellow and blue."),
    ("Reverse the word: lantern", "nretnal"),
)
"""Default prompts: plain texts, and questions with answers in the model's own chat template."""


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a prompt file. Raises `UserError` naming the line that has neither messages nor prompt."""
    try:
        found = list(json_lines(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); give a JSONL file") from None
    kinds = {"prompt": str, "messages": list}
    for where, row in found:
        given = [key for key in kinds if key in row]
        if len(given) != 1 or not isinstance(row[given[0]], kinds[given[0]]):
            raise UserError(f"{where}: give a JSON object with messages (a list) or prompt (a text)")
    if not found:
        raise UserError(f"{path} has no prompts; give a JSON object with messages or prompt a line")
    return [row for _, row in found]


def default_prompts() -> list[dict[str, Any]]:
    """The prompts that are taken where no file is given."""
    words = ("user", "assistant")
    chats = [[{"role": role, "content": text} for role, text in zip(words, pair, strict=True)] for pair in QUESTIONS]
    return [*({"prompt": text} for text in TEXTS), *({"messages": chat} for chat in chats)]


def encode(folder: Path, rows: list[dict[str, Any]]) -> tuple[list[str], list[np.ndarray]]:
    """Texts and token ids of the prompts, by the folder's own tokenizer and chat template. Raises `UserError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        texts: list[str] = [
            row["prompt"] if "prompt" in row else str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
            for row in rows
        ]
        tokens = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64) for text in texts]
    except Exception as error:  # whatever a template raises, or the library for files that are not as it expects
        raise UserError(f"the tokenizer of {folder} does not take the prompts: {error}") from None
    for text, ids in zip(texts, tokens, strict=True):
        if not 2 <= len(ids) <= LONGEST:
            raise UserError(f"the prompt {text[:60]!r} has {len(ids)} tokens; give prompts of 2 to {LONGEST}")
    return texts, tokens


def certified_hash(folder: Path, hf: HFFolder) -> str:
    """The content hash of the weights, read whole. Raises `UserError` when a certificate beside them has another."""
    found = content_hash(facts_of(hf))
    if (folder / CERTIFICATE).exists() and read_certificate(folder)["output"]["sha256"] != found:
        raise UserError(
            f"the weights of {folder} are not those of its certificate.json; python conversion/certify.py verify "
            f"{folder} says what differs"
        )
    return found


def golden(folder: Path, rows: list[dict[str, Any]], beside: Path, unquantized: Path | None = None) -> Golden:
    """The golden answers of a model folder to `rows` (see `read_prompts`); `unquantized` is what an FP8 folder was made
    from. Raises `UserError`."""
    import torch

    from conversion.dequantize import activation_scales

    with HFFolder(folder, quantized=True) as hf:
        facts: dict[str, Any] = {"transformers": version("transformers"), "model_sha256": certified_hash(folder, hf)}
        texts, tokens = encode(folder, rows)
        top = max(int(ids.max()) for ids in tokens)
        if top >= hf.arch.vocab_size:
            raise UserError(f"the tokenizer of {folder} gives token {top}; the model ends at {hf.arch.vocab_size - 1}")
        quantized = any(entry.dtype == FP8 for entry in hf.layout.entries.values())
        scales = activation_scales(hf).as_served() if quantized else None
        exact = answers(hf, tokens, Way(torch.float32, scales), beside)
        if not all(np.isfinite(part).all() for part in exact.logprobs):
            raise UserError(
                f"{folder} gives log-probabilities that are no numbers; check it with conversion/lint_export.py"
            )
        bf16 = answers(hf, tokens, Way(torch.bfloat16, scales), beside)
        others = {UNROUNDED: answers(hf, tokens, Way(torch.float32, None), beside).logprobs} if quantized else {}
        if unquantized is not None:
            others[UNQUANTIZED] = _of_source(folder, quantized, unquantized, tokens, beside)
        experts = {"reached": exact.reached, "of": hf.arch.n_routed_experts * len(hf.arch.moe_layers)}
        found = Golden(texts, tokens, exact.logprobs, bf16.logprobs, others, facts)
        faults = []
        for name, way in planted(hf, scales, exact).items():
            said = answers(hf, tokens, way, beside).logprobs
            mean = float(np.abs(np.concatenate(differences(exact.logprobs, said))).mean())
            faults.append({"name": name, "mean": mean, "seen": bool(problems(found, said))})
    return replace(found, facts=facts | {"fp8": quantized, "experts": experts, "planted": faults})


def _of_source(folder: Path, quantized: bool, source: Path, tokens: list[np.ndarray], beside: Path) -> list[np.ndarray]:
    """The answers of the folder that an FP8 folder was made from. Raises `UserError` where it was not."""
    import torch

    if not quantized:
        raise UserError(f"{folder} is not in FP8; leave out --unquantized")
    with HFFolder(source) as hf:
        found = content_hash(facts_of(hf))
        if (folder / CERTIFICATE).exists() and (came := read_certificate(folder)["input"]["sha256"]) != found:
            raise UserError(
                f"--unquantized {source} has content hash {found[:16]}; give the folder that {folder} was made from, "
                f"{came[:16]}"
            )
        return answers(hf, tokens, Way(torch.float32, None), beside).logprobs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="DIR", help="Hugging Face model folder, merged or FP8, or a preset")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="JSONL with messages or prompt a line")
    parser.add_argument(
        "--unquantized", metavar="MERGED", type=resolve_model, help="the folder that an FP8 DIR was made from"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: DIR.golden.safetensors)")
    args = parser.parse_args()
    folder = resolve_model(args.folder)
    out = args.out or folder.resolve().parent / f"{folder.resolve().name}.golden.safetensors"
    if folder.resolve() in out.resolve().parents:
        raise UserError(
            f"{out} lies in the model's folder, where servers load every *.safetensors; choose another place"
        )
    rows = read_prompts(args.prompts) if args.prompts else default_prompts()
    found = golden(folder, rows, out.resolve(), args.unquantized)
    found.write(out)
    experts, limits = found.facts["experts"], Limits.of(found)
    print(
        f"{out}: {len(found.texts)} prompts, {sum(map(len, found.tokens))} tokens, which reached "
        f"{experts['reached']} of {experts['of']} routed experts; a server may be off by {limits.largest:.3f} nats at "
        f"a token, by {limits.mean:.3f} on average over a prompt and by {limits.overall:.3f} over all"
    )
    for fault in found.facts["planted"]:
        print(f"planted: {fault['name']}: off by {fault['mean']:.3f}, {'seen' if fault['seen'] else 'NOT SEEN'}")
    print(f"a pass does not show: {'; '.join(unseen(found))}")
    return 0


if __name__ == "__main__":
    run(main)
