"""Golden answers of an exported model: what a server that reads the folder right must answer.

    python conversion/golden.py DIR [--prompts FILE] [--out FILE]

DIR is a Hugging Face folder, merged or in FP8. Its log-probability of every token of a few prompts is computed in FP32
by transformers' code, layer by layer, so that one layer of weights is all that must fit in memory (5.2 GB at most for
Nano); of an FP8 folder with weights, activations and cache rounded as a server rounds them. The tolerances are
measured: the same in BF16 shows what rounding alone does to this model on these prompts. conversion/check_server.py
compares a running server with the file.

The file of prompts has a JSON object with `messages` (chat JSONL) or `prompt` (plain text) a line; without it a few
texts of our own are taken. The output must not lie in the model's folder, where servers load every *.safetensors.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run, scratch_folder
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conversion.certificates.certificate_json import read_certificate
from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import CERTIFICATE
from conversion.checkpoint.safetensors_layout import FP8
from conversion.checkpoint.tensor_digests import content_hash, facts_of
from conversion.fp8.golden_file import Golden, Tolerance
from nano3.arch import resolve_model
from nano3.documents import json_lines

if TYPE_CHECKING:
    import torch

    from conversion.fp8.layerwise import Hidden
    from nano3.fp8_emulation import ActivationScales

LONGEST = 4096
"""Tokens of a prompt at most: vLLM keeps the log-probabilities of a whole prompt in memory."""
FACTORS, FLOORS = Tolerance(3.0, 2.0, 1.75), Tolerance(0.1, 0.02, 0.01)
"""Tolerances are these multiples of what BF16 does to the golden answers themselves, and no less than these nats. A
server in BF16 adds in another order, which is an error of the same size; the tail of single tokens is long, the mean
over all of them is steady."""

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
    except Exception as error:  # whatever a template raises
        raise UserError(f"the tokenizer of {folder} does not take the prompts: {error}") from None
    tokens = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64) for text in texts]
    for text, ids in zip(texts, tokens, strict=True):
        if not 2 <= len(ids) <= LONGEST:
            raise UserError(f"the prompt {text[:60]!r} has {len(ids)} tokens; give prompts of 2 to {LONGEST}")
    return texts, tokens


def logprobs(
    hf: HFFolder, tokens: list[np.ndarray], dtype: torch.dtype, beside: Path, scales: ActivationScales | None
) -> tuple[list[np.ndarray], int]:
    """Log-probability of every token given those before it, an FP32 array for each prompt; and how many routed experts
    the prompts reached.

    Hidden states lie in a hidden folder beside the path `beside` meanwhile.
    """
    from tqdm import tqdm

    from conversion.fp8.layerwise import Hidden

    reached = 0
    with scratch_folder(beside) as scratch:
        hidden = Hidden(hf, tokens, scratch, dtype)
        hidden.embed()
        name = str(dtype).removeprefix("torch.")
        for number in tqdm(range(len(hf.arch.layers)), desc=f"golden {name}", unit="layer", disable=None):
            reached += _through_layer(hf, hidden, number, scales)
        return [_of_prompt(hf, state, ids) for state, ids in zip(hidden, tokens, strict=True)], reached


def _through_layer(hf: HFFolder, hidden: Hidden, number: int, scales: ActivationScales | None) -> int:
    """One layer, which is let go of before the next is built; returns how many routed experts got a token."""
    import torch

    from conversion.fp8.layerwise import build_layer, count_tokens

    model = build_layer(hf, number, hidden.dtype)
    counts = torch.zeros(hf.arch.n_routed_experts, dtype=torch.long)
    if hf.arch.layers[number] == "E":
        count_tokens(model, counts)
    if scales is not None:
        scales.attach_layer(model.layers[0], number)
    hidden.pass_through(model)
    return int((counts > 0).sum())


def _of_prompt(hf: HFFolder, hidden: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    """The last norm and lm_head, a few rows of the vocabulary at a time."""
    import torch

    from conversion.checkpoint.pieces import row_steps

    arch, state = hf.arch, hidden[:-1].float()
    norm = hf.rows("backbone.norm_f.weight", 0, arch.hidden_size).to(hidden.dtype).float()
    state = state * torch.rsqrt(state.square().mean(-1, keepdim=True) + arch.layer_norm_epsilon) * norm
    state, wanted = state.to(hidden.dtype), torch.from_numpy(ids[1:])
    total = torch.full((len(state),), -torch.inf)
    chosen = torch.zeros(len(state))
    for start, count in row_steps(arch.vocab_size, 4 * arch.hidden_size):
        part = (state @ hf.rows("lm_head.weight", start, count).to(hidden.dtype).T).float()
        total = torch.logaddexp(total, part.logsumexp(1))
        inside = (wanted >= start) & (wanted < start + count)
        chosen[inside] = part[inside, wanted[inside] - start]
    return torch.cat([torch.zeros(1), chosen - total]).numpy()


def tolerance(exact: list[np.ndarray], rounded: list[np.ndarray]) -> Tolerance:
    """How far a right server may be off, from the log-probabilities in FP32 and in BF16, an array for each prompt."""
    off = [np.abs(a - b)[1:] for a, b in zip(exact, rounded, strict=True)]
    found = Tolerance(
        max(float(part.max()) for part in off),
        max(float(part.mean()) for part in off),
        float(np.concatenate(off).mean()),
    )
    values = {name: max(getattr(FACTORS, name) * size, getattr(FLOORS, name)) for name, size in asdict(found).items()}
    return Tolerance(**values)


def certified_hash(folder: Path, hf: HFFolder) -> str:
    """The content hash of the weights, read whole. Raises `UserError` when a certificate beside them has another."""
    found = content_hash(facts_of(hf))
    if (folder / CERTIFICATE).exists() and read_certificate(folder)["output"]["sha256"] != found:
        raise UserError(
            f"the weights of {folder} are not those of its certificate.json; python conversion/certify.py verify "
            f"{folder} says what differs"
        )
    return found


def golden(folder: Path, rows: list[dict[str, Any]], beside: Path) -> Golden:
    """The golden answers of a model folder to `rows` (see `read_prompts`). Raises `UserError`."""
    import torch

    from conversion.dequantize import activation_scales

    with HFFolder(folder, quantized=True) as hf:
        facts: dict[str, Any] = {"transformers": version("transformers"), "model_sha256": certified_hash(folder, hf)}
        texts, tokens = encode(folder, rows)
        top = max(int(ids.max()) for ids in tokens)
        if top >= hf.arch.vocab_size:
            raise UserError(f"the tokenizer of {folder} gives token {top}; the model ends at {hf.arch.vocab_size - 1}")
        quantized = any(entry.dtype == FP8 for entry in hf.layout.entries.values())
        scales = activation_scales(hf) if quantized else None
        exact, reached = logprobs(hf, tokens, torch.float32, beside, scales)
        rounded, _ = logprobs(hf, tokens, torch.bfloat16, beside, scales)
        facts |= {
            "fp8": quantized,
            "experts": {"reached": reached, "of": hf.arch.n_routed_experts * len(hf.arch.moe_layers)},
        }
    if not all(np.isfinite(part).all() for part in exact):
        raise UserError(
            f"{folder} gives log-probabilities that are no numbers; check it with conversion/lint_export.py"
        )
    return Golden(texts, tokens, exact, tolerance(exact, rounded), facts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="DIR", help="Hugging Face model folder, merged or FP8, or a preset")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="JSONL with messages or prompt a line")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: DIR.golden.safetensors)")
    args = parser.parse_args()
    folder = resolve_model(args.folder)
    out = args.out or folder.resolve().parent / f"{folder.resolve().name}.golden.safetensors"
    if folder.resolve() in out.resolve().parents:
        raise UserError(
            f"{out} lies in the model's folder, where servers load every *.safetensors; choose another place"
        )
    found = golden(folder, read_prompts(args.prompts) if args.prompts else default_prompts(), out.resolve())
    found.write(out)
    experts, limits = found.facts["experts"], found.tolerance
    print(
        f"{out}: {len(found.texts)} prompts, {sum(map(len, found.tokens))} tokens, which reached "
        f"{experts['reached']} of {experts['of']} routed experts; a server may be off by {limits.largest:.3f} nats at "
        f"a token, by {limits.mean:.3f} on average over a prompt and by {limits.overall:.3f} over all"
    )
    return 0


if __name__ == "__main__":
    run(main)
