"""`make check-vllm`: vLLM on a CPU, an implementation that is not ours, reads what we export and answers as we say.

    python -m tests.check_vllm [--keep FOLDER]

Needs build/vllm (the target makes it). Pico's folders are made anew, in a scratch folder or in FOLDER. vLLM runs in its
own environment with a plug-in of ours (tests/vllm_cpu/plugin.py), once as a server on loopback. A line for each thing
that is checked, with its figure. Exit code 0: all hold; 1: one does not, or vLLM fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from conversion.adapters.unmerged import with_adapter
from evaluation.generation import encode_prompts, load_tokenizer, write_answers
from evaluation.hf_model import load_reference
from nano3.fp8_emulation import rounded
from tests.vllm_cpu.cache import into_cache, toward_zero
from tests.vllm_cpu.engine import PYTHON, has_fp8_cache, probe, serve
from tests.vllm_cpu.models import make, questions

LONGEST, ANSWERS = 24, 40
EXACT = 1e-3
"""Nats, largest difference in FP32."""
FLIPPED = 0.03
"""Nats, mean difference where values are rounded to FP8: a sum in another order flips single codes and routes."""


class Checks:
    """What was checked, printed as it is found."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, holds: bool, figure: str) -> None:
        self.failed += not holds
        print(f"{'pass' if holds else 'FAIL'}  {what}: {figure}", flush=True)


def logprobs(model: Any, rows: list[list[int]]) -> np.ndarray:
    """A transformers model's log-probability of every token but the first of each row."""
    found = []
    for row in map(torch.tensor, rows):
        with torch.no_grad():
            given = model(row[None]).logits[0].float().log_softmax(-1)[:-1]
        found.append(given.gather(1, row[1:, None])[:, 0].numpy())
    return np.concatenate(found)


def off(found: list[list[float]], reference: np.ndarray) -> np.ndarray:
    """How far vLLM's log-probabilities are from ours, in nats, for every token."""
    return np.abs(np.concatenate([np.array(row) for row in found]) - reference)


def check_merged(check: Checks, folder: Path, rows: list[list[int]]) -> None:
    """Over HTTP: conversion/check_server.py, and each token against plain transformers in FP32."""
    from conversion.check_server import Server

    file = folder / "merged.golden.safetensors"
    with serve(folder / "merged", folder / "server.log") as url:
        command = [sys.executable, "conversion/check_server.py", url, "--golden", str(file), "--timeout", "300"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        server = Server(url, 300)
        found = [server.logprobs(np.array(row))[1:].tolist() for row in rows]
    mean = next((line for line in done.stdout.splitlines() if line.startswith("all prompts")), done.stderr[-300:])
    check("merged, over HTTP, check_server.py", done.returncode == 0, mean)
    largest = off(found, logprobs(load_reference(folder / "merged", torch.float32), rows)).max()
    check("merged, over HTTP, against transformers", largest < EXACT, f"largest difference {largest:.1e} nats")


def vllm_modules(folder: Path) -> tuple[list[str], dict[str, list[float]]]:
    """What vLLM should have in FP8, by its names, and the scales of each attention layer's cache, from the file."""
    coded, cache = set(), {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no dictionary)
            module = name.replace("backbone.", "model.").rpartition(".")[0]
            if file.get_slice(name).get_dtype() == "F8_E4M3":
                layer, experts, _ = module.partition(".experts.")
                coded.add(f"{layer}.experts.routed_experts" if experts else module)
            if name.endswith("k_scale"):
                pair = (name, name.replace("k_proj.k_scale", "v_proj.v_scale"))
                cache[f"{module.rpartition('.')[0]}.attn"] = [float(file.get_tensor(part)) for part in pair]
    return sorted(coded), cache


def check_fp8(check: Checks, folder: Path, rows: list[list[int]]) -> None:
    """In process, in FP32: which modules, which scales, and the answers without and with the cache in FP8."""
    plain, scales = folder / "fp8-plain", json.loads((folder / "cache.json").read_text())
    found = probe(folder / "fp8-bare", {}, rows)
    coded, pairs = vllm_modules(folder / "fp8")
    check("FP8, modules that vLLM reads as codes", found["coded"] == coded, f"{len(found['coded'])} of {len(coded)}")
    distance = off(found["logprobs"], logprobs(load_reference(plain, torch.float32), rows))
    figure = f"mean difference {distance.mean():.1e} nats, largest {distance.max():.1e}"
    check("FP8, cache in FP32, against our emulation", distance.mean() < FLIPPED, figure)
    if not has_fp8_cache():
        print("not checked: FP8 cache; vLLM requires AVX-512 for it on a CPU")
        return
    found = probe(folder / "fp8", {}, rows)
    near = {name: bool(np.allclose(found["cache"].get(name, np.nan), pair)) for name, pair in pairs.items()}
    check("FP8, scales of the cache as in the file", all(near.values()), f"{sum(near.values())} of {len(near)} layers")
    means = {}
    for name, how in (("toward zero", toward_zero), ("to nearest", rounded)):
        model = load_reference(plain, torch.float32)
        into_cache(model, scales, how)
        means[name] = off(found["logprobs"], logprobs(model, rows)).mean()
    figure = f"mean difference {means['toward zero']:.4f} nats; from one rounded to nearest {means['to nearest']:.4f}"
    check("FP8, cache in FP8, against a cache rounded toward zero", means["toward zero"] < FLIPPED, figure)


def check_adapters(check: Checks, folder: Path) -> None:
    """In process: greedy answers with each adapter and their log-probabilities, against it beside the weights."""
    tokenizer, asked = load_tokenizer(str(folder / "merged")), questions(8, 5)
    prompts = encode_prompts(tokenizer, [row["messages"][:1] for row in asked])[:ANSWERS]
    files = {"adapter": str(folder / "vllm"), "challenge": str(folder / "unpacked")}
    found = probe(folder / "base", {"enable_lora": True, "max_lora_rank": 8}, [], prompts, LONGEST, files)
    bare = load_reference(folder / "base", torch.float32)
    for name, what in (("adapter", "LoRA of every matrix, each expert's too"), ("challenge", "the submission's zip")):
        model = load_reference(folder / "base", torch.float32)
        with_adapter(folder / name, folder / "base")(model)
        ours = _answers(model, prompts)
        equal = sum(a == b for a, b in zip(found["answers"][name], ours, strict=True))
        rows = [prompt + answer for prompt, answer in zip(prompts, found["answers"][name], strict=True)]
        lengths = [len(row) for row in found["said"][name]]
        with_it, without = (_ends(logprobs(one, rows), rows, lengths) for one in (model, bare))
        largest, moved = off(found["said"][name], with_it).max(), np.abs(without - with_it).mean()
        figure = f"{equal} of {len(ours)} answers equal, tokens within {largest:.1e} nats; it moves them by {moved:.3f}"
        check(f"{what}, against the unmerged model", equal == len(ours) and largest < EXACT < moved / 5, figure)


def _ends(values: np.ndarray, rows: list[list[int]], lengths: list[int]) -> np.ndarray:
    """Of the log-probabilities of every token but the first of each row, those of its last `lengths` tokens."""
    ends = np.cumsum([len(row) - 1 for row in rows])
    return np.concatenate([values[end - length : end] for end, length in zip(ends, lengths, strict=True)])


def _answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [list(answer.tokens) for (answer,) in write_answers(model, prompts, LONGEST, progress=False)]


def scratch(keep: Path | None) -> Iterator[Path]:
    """FOLDER, which must be new, or one that goes at the end."""
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.check_vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder for models and logs, kept")
    args = parser.parse_args()
    if not PYTHON.is_file() or (args.keep is not None and args.keep.exists()):
        print(f"error: {args.keep} exists; give a new folder" if PYTHON.is_file() else "error: run make check-vllm")
        return 2
    check = Checks()
    torch.set_num_threads(1)
    for folder in scratch(args.keep):
        print(f"making pico's folders in {folder}", flush=True)
        make(folder)
        rows = _rows(folder)
        check_merged(check, folder, rows)
        check_fp8(check, folder, rows)
        check_adapters(check, folder)
    print(f"{check.failed} FAILED" if check.failed else "all hold")
    return 1 if check.failed else 0


def _rows(folder: Path) -> list[list[int]]:
    from conversion.fp8.golden_file import Golden

    return [tokens.tolist() for tokens in Golden.read(folder / "merged.golden.safetensors").tokens]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
