"""mlx-lm, which shares no code with us or with transformers, reads what we export (`make build/reference/mlx-lm`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.fp8.selection import Selection
from conversion.merge_lora import merge
from conversion.quantize_fp8 import quantize
from evaluation.generation import encode_prompts, load_tokenizer, write_answers
from evaluation.hf_model import load_reference
from nano3.arch import PRESETS, Arch
from pico.tasks import DEMO, PRETRAINING, rows
from tests.conversion.test_merge import write_adapter
from tests.helpers.fetched import not_here

ROOT = Path(__file__).parents[2]
MLX = ROOT / "build" / "reference" / "mlx-lm"
LONGEST = 24
pytestmark = pytest.mark.full


def questions() -> list[dict[str, Any]]:
    """A hundred of pico's own, of every kind, and of the kind that the demo teaches it."""
    tasks = [task for task, _ in PRETRAINING.values()] + [DEMO]
    return [row for task in tasks for row in rows(task, 15, seed=5)][:100]


def small_values(tensors: dict[str, torch.Tensor]) -> None:
    """An adapter that changes every module a little, so that pico still answers."""
    generator = torch.Generator().manual_seed(1)
    for key, tensor in tensors.items():
        tensors[key] = 0.03 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`merged`: pico with an adapter for everything, FP32. `swapped`: two of its experts swapped. `fp8`: pico in FP8.
    `scaled`: one of its scales doubled."""
    folder = tmp_path_factory.mktemp("mlx")
    base = folder / "base"
    shutil.copytree(PRESETS["pico"], base)
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    save_file({n: t.float() for n, t in load_file(base / "model.safetensors").items()}, base / "model.safetensors")
    write_adapter(folder / "adapter", small_values, config=config, experts="each")
    merge(base, folder / "adapter", folder / "merged")
    shutil.copytree(folder / "merged", folder / "swapped")
    tensors = load_file(folder / "merged" / "model.safetensors")
    two, five = (f"backbone.layers.4.mixer.experts.{number}.up_proj.weight" for number in (2, 5))
    tensors[two], tensors[five] = tensors[five], tensors[two]
    save_file(tensors, folder / "swapped" / "model.safetensors", {"format": "pt"})
    samples = [np.random.default_rng(0).integers(0, 128, 64)]
    quantize(PRESETS["pico"], folder / "fp8", Selection.published(Arch.load(PRESETS["pico"])), samples)
    shutil.copytree(folder / "fp8", folder / "scaled")
    tensors = load_file(folder / "fp8" / "model.safetensors")
    tensors[f"{SCALED}_scale"] *= 2
    save_file(tensors, folder / "scaled" / "model.safetensors", {"format": "pt"})
    return folder


SCALED = "backbone.layers.4.mixer.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def asked(folders: Path) -> dict[str, Any]:
    """Token ids of conversations, prompt and answer, and of the prompts alone."""
    tokenizer = load_tokenizer(str(folders / "merged"))
    chosen = questions()
    prompts = encode_prompts(tokenizer, [row["messages"][:1] for row in chosen])
    answers = tokenizer([row["messages"][1]["content"] for row in chosen], add_special_tokens=False)["input_ids"]
    return {"prompts": prompts, "rows": [p + a for p, a in zip(prompts, answers, strict=True)][::10]}


@pytest.fixture(scope="module")
def found(folders: Path, asked: dict[str, Any]) -> Any:
    """What mlx makes of all four."""
    if not (MLX / ".done").is_file():
        not_here(f"no {MLX}: run `make build/reference/mlx-lm`")
    job = asked | {
        "answering": "merged",
        "longest": LONGEST,
        "models": {name: str(folders / name) for name in ("merged", "swapped")},
        "fp8": {name: str(folders / name) for name in ("fp8", "scaled")},
    }
    (folders / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.helpers.mlx_probe", str(folders / "job.json"), str(folders / "out.npz")]
    paths = {"PYTHONPATH": f"{MLX}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folders / "out.npz")


@pytest.fixture(scope="module")
def reference(folders: Path) -> Any:
    return load_reference(folders / "merged", torch.float32)


def errors(reference: Any, found: Any, asked: dict[str, Any], name: str) -> float:
    """The largest difference from transformers, in nats, over the tokens of all rows."""
    largest = 0.0
    for number, row in enumerate(asked["rows"]):
        tokens = torch.tensor([row])
        with torch.no_grad():
            expected = reference(tokens).logits.float().log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
        largest = max(largest, float(np.abs(found[f"{name}/logprobs/{number}"] - expected.numpy()).max()))
    return largest


def test_log_probabilities_of_the_merged_model(reference, found, asked):
    error = errors(reference, found, asked, "merged")
    print(f"\nlargest difference from mlx-lm: {error:.1e} nats")
    assert error < 5e-5


def test_greedy_answers_are_the_same(reference, found, asked):
    answers = write_answers(reference, asked["prompts"], LONGEST, progress=False)
    ours = [list(answer.tokens) for (answer,) in answers]
    assert ours == [found[f"answer/{number}"].tolist() for number in range(len(ours))]
    assert len(ours) == 100
    assert len({tuple(answer) for answer in ours}) > 50


def test_two_experts_swapped_are_seen(reference, found, asked):
    assert errors(reference, found, asked, "swapped") > 0.1


def too_far(found: Any, name: str) -> list[str]:
    """Matrices with a value that is no rounding of the unquantized one.

    E4M3 keeps 3 bits behind the leading one, hence a sixteenth of the value, and 2^-9 of the scale near zero. The
    division by the scale rounds to BF16 first: 2^-8 on top.
    """
    original, wrong = load_file(PRESETS["pico"] / "model.safetensors"), []
    for key in found.files:
        if key.startswith(f"{name}/decoded/"):
            tensor = key.removeprefix(f"{name}/decoded/")
            value = original[tensor].float().numpy()
            allowed = np.abs(value) * (1 / 16 + 2**-8) + np.abs(value).max() / 448 * 2**-9
            if (np.abs(found[key] - value) > allowed).any():
                wrong.append(tensor)
    return wrong


def test_fp8_is_code_times_scale_to_mlx_too(found):
    assert sum(key.startswith("fp8/decoded/") for key in found.files) == 76
    assert too_far(found, "fp8") == []
    assert too_far(found, "scaled") == [SCALED]
