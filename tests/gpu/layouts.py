"""Tier (c): the recipe on several layouts, each against one rank, then tokens a second of the real model.

Runs `recipes/nemotron_lora.py` as a user would and reads its metrics.jsonl. On GPUs in BF16; on CPU ranks (`local`) in
FP32, where a test uses it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from nano3.arch import PRESETS, Arch
from tests.gpu.record import ROOT, Row, worst

LAYOUTS = ("ep=8", "tp=2 ep=4", "tp=4", "pp=3", "tp=2 pp=3")
"""Of pico, which has 9 layers, 8 experts and 4 attention heads; the rest of the GPUs are data parallel."""
STEPS = 3
LOSS_BOUND, NORM_BOUND = 1e-2, 5e-2
"""Relative, in BF16, over three steps: layouts add in another order, and a few tokens are routed otherwise."""
QLORA_BOUND = 5e-2
"""Likewise, of BF16 against FP32; not measured."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
COUNTED = 20
"""Steps of the real model; the first quarter warms up."""


def data(folder: Path) -> Path:
    """A token store of short sorting tasks for pico, packed to 512."""
    folder.mkdir(exist_ok=True)
    raw, store = folder / "raw.jsonl", folder / "store"
    _python("data_prep/generate.py", "--task", "number_sorting", "--size", "400", "--seed", "1", "--out", str(raw))
    _python(
        "data_prep/prepare.py", "--input", str(raw), "--tokenizer", "pico", "--out", str(store), "--seq-length", "512"
    )
    return store


def _python(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def train(
    out: Path,
    model: str,
    store: Path,
    ranks: int,
    local: bool,
    settings: list[str],
    recipe: str = "recipes/nemotron_lora.py",
) -> list[dict]:
    """Rows of metrics.jsonl with a loss, of a run on `ranks` GPUs or CPU ranks."""
    where = ["--local", "--ranks", str(ranks)] if local else ["--gpus-per-node", str(ranks)]
    paths = ["--model", model, "--data", str(store), "--out", str(out)]
    _python(recipe, *paths, *where, *settings)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def compare(
    folder: Path,
    ranks: int,
    local: bool = False,
    layouts: tuple[str, ...] = LAYOUTS,
    bounds: tuple = (LOSS_BOUND, NORM_BOUND),
) -> list[Row]:
    """Two rows for each layout: the largest relative difference of loss and of gradient norm from one rank's."""
    store = data(folder)
    common = [f"train.steps={STEPS}", "train.warmup=0", "train.seq_length=512", "train.global_batch=8", "lora.rank=16"]
    single = train(folder / "one", "pico", store, 1, local, [*common, "layout.ep=1"])
    rows = []
    for layout in layouts:
        sizes = [f"layout.{size}" for size in layout.split()]
        if not any(size.startswith("layout.ep=") for size in sizes):
            sizes.append("layout.ep=1")
        used = ranks if local else _fitting(layout, ranks)
        found = train(folder / layout.replace(" ", "-"), "pico", store, used, local, [*common, *sizes])
        for name, bound in zip(("loss", "grad_norm"), bounds, strict=True):
            errors = [abs(a[name] / b[name] - 1) for a, b in zip(found, single, strict=True)]
            rows.append(Row(f"{layout} on {used}: {name}, {STEPS} steps", worst(errors), bound))
    return rows


def qlora(folder: Path, local: bool) -> list[Row]:
    """`recipes/nemotron_qlora.py` on one GPU in BF16 beside one CPU rank in FP32: the losses of pico's first steps."""
    store = data(folder / "data")
    settings = [f"train.steps={STEPS}", "train.warmup=0", "train.seq_length=512", "train.global_batch=8"]
    recipe = "recipes/nemotron_qlora.py"
    found = [
        train(folder / name, "pico", store, 1, cpu, settings, recipe)
        for name, cpu in (("qlora", local), ("qlora-cpu", True))
    ]
    errors = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(*found, strict=True)]
    return [Row(f"QLoRA on one GPU: loss, {STEPS} steps", worst(errors), QLORA_BOUND)]


def qwen3_qlora(folder: Path, gpu: bool = True) -> list[Row]:
    """`recipes/qwen3_qlora.py` on one GPU in BF16 beside the CPU in FP32: a tiny Qwen3's losses of the first steps.

    The model is made here, with pico's tokenizer. `gpu` False: the CPU on both sides, where a test uses it.
    """
    folder.mkdir(exist_ok=True)
    store, model = data(folder / "data"), tiny_qwen3(folder / "qwen3")
    found = []
    for name, hidden in (("first", {} if gpu else NO_GPU), ("cpu", NO_GPU)):
        paths = ["--model", str(model), "--data", str(store), "--out", str(folder / name)]
        _python("recipes/qwen3_qlora.py", *paths, "--seq-length", "512", "--epochs", "0.2", "--dropout", "0", **hidden)
        found.append([json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()])
    errors = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(*found, strict=True)]
    return [Row(f"QLoRA of a tiny Qwen3 on one GPU: loss, {len(errors)} steps", worst(errors), QLORA_BOUND)]


def tiny_qwen3(folder: Path) -> Path:
    """Writes a random Qwen3 of two layers with pico's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    pico = PRESETS["pico"]
    config = Qwen3Config(vocab_size=Arch.load(pico).vocab_size, initializer_range=0.1, **sizes, **heads)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in (*pico.glob("tokenizer*"), *pico.glob("*.jinja")):
        shutil.copy(file, folder)
    return folder


def _fitting(layout: str, ranks: int) -> int:
    """The most of `ranks` that the layout's sizes divide."""
    product = 1
    for size in layout.split():
        name, number = size.split("=")
        product *= int(number) if name in ("tp", "pp") else 1
    return ranks // product * product


def speed(folder: Path, model: str, store: str, ranks: int) -> list[Row]:
    """Tokens a second of the real model with the recipe's defaults."""
    rows = train(folder / "nano", model, Path(store), ranks, False, [f"train.steps={COUNTED}", "train.warmup=2"])
    rates = [row["tokens"] / row["seconds"] for row in rows[COUNTED // 4 :]]
    return [Row("tokens a second on each GPU", statistics.median(rates) / ranks, None, "tokens/s")]
