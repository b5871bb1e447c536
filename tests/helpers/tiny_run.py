"""One LoRA run on CPU ranks from a test: what a rank of the recipe runs, on a tiny model."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.recipe_file import keep, recipe_of
from finetune.settings import Run, Settings
from recipes.nemotron_lora import nemotron_3_nano_lora
from tests.helpers.rank_server import server


def write_run(
    folder: Path, name: str, ranks: int, settings: Settings, validate: bool = False, data: str = "store"
) -> Path:
    """Writes `folder/NAME.json`: model `hf`, base `nemo` and `data` of the same folder, output `folder/NAME`.

    With `validate` it validates on `store`.
    """
    validation = str(folder / "store") if validate else None
    hf, nemo, out, train = (str(folder / part) for part in ("hf", "nemo", name, data))
    run = Run(hf, nemo, train, validation, out, 1, ranks, True, settings, recipe=recipe_of(nemotron_3_nano_lora))
    keep(run.recipe, Path(out))
    path = folder / f"{name}.json"
    path.write_text(run.to_json())
    return path


def run(path: Path, module: str = "finetune.worker", *arguments: str, **environment: str) -> Path:
    """Runs what `write_run` wrote and returns its output folder; a failure shows the ends of the ranks' logs."""
    run = Run.from_json(path.read_text())
    out = Path(run.out)
    codes = server().run(path, module, *arguments, **environment)
    assert codes == [0] * run.ranks, "\n".join(log.read_text()[-3000:] for log in sorted((out / "logs").iterdir()))
    return out


def metrics(out: Path) -> list[dict]:
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def digest_of(pack: Mapping[str, Any]) -> str:
    """What a pack holds, to compare by: arrays as a store gives them, or tensors as training gets them."""
    values = (np.asarray(pack[key]).ravel().tobytes() for key in ("tokens", "labels", "loss_mask"))
    return hashlib.sha256(b"".join(values)).hexdigest()
