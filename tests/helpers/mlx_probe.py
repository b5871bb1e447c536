"""Runs Hugging Face folders by mlx-lm's own code, and decodes FP8 by mlx's.

    PYTHONPATH=build/reference/mlx-lm python -m tests.helpers.mlx_probe JOB.json OUT.npz

JOB: `models`, name -> folder; `rows`, lists of token ids; `answering`, the model that answers `prompts`, in `longest`
tokens at most; `fp8`, name -> FP8 folder. OUT: `NAME/logprobs/N`, the log-probability of each token of row N but the
first; `answer/N` to prompt N, without the stop token; `NAME/decoded/TENSOR`, code * scale in FP32. A process of its
own: mlx is not installed in .venv, and has threads of its own.
"""

from __future__ import annotations

import json
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from evaluation.generation import STOP_IDS


def logprobs(model: Any, row: list[int]) -> np.ndarray:
    logits = model(mx.array([row]))[0].astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(mx.take_along_axis(found[:-1], mx.array(row[1:])[:, None], axis=-1)[:, 0])


def greedy(model: Any, prompt: list[int], longest: int) -> np.ndarray:
    answer = (int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=longest))
    return np.array(list(takewhile(lambda token: token not in STOP_IDS, answer)), dtype=np.int64)


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """Every FP8 tensor of a folder as mlx reads its codes, times its scale."""
    tensors: dict[str, Any] = mx.load(str(folder / "model.safetensors"))
    scaled = [name for name in tensors if f"{name}_scale" in tensors]
    return {name: np.array(mx.from_fp8(tensors[name], mx.float32) * tensors[f"{name}_scale"]) for name in scaled}


def main(job: dict[str, Any]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, folder in job["models"].items():
        model, _ = load_model(Path(folder))
        for number, row in enumerate(job["rows"]):
            found[f"{name}/logprobs/{number}"] = logprobs(model, row)
        if name == job["answering"]:
            for number, prompt in enumerate(job["prompts"]):
                found[f"answer/{number}"] = greedy(model, prompt, job["longest"])
    for name, folder in job["fp8"].items():
        found |= {f"{name}/decoded/{tensor}": value for tensor, value in decoded(Path(folder)).items()}
    return found


if __name__ == "__main__":
    np.savez(sys.argv[2], **main(json.loads(Path(sys.argv[1]).read_text())))
