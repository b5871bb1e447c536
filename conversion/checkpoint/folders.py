"""What the conversion scripts share: the parts of a NeMo folder, side files, disk space, a progress bar. Torch-free."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nano3.arch import is_nemo_checkpoint
from nano3.cli import UserError, free_disk

NEMO_KIND = "nemo-checkpoint"
HF_KIND = "hf-model"
"""Kinds of folders that we write (see `nano3.cli.fresh_output`)."""

WEIGHTS = "weights"
CONTEXT = "context"
SIDE = "hf"
LAYOUT = "safetensors.json"
"""Parts of a NeMo folder: Megatron's weights, NeMo's context, the Hugging Face folder's side files, and how its
safetensors files were laid out."""

CERTIFICATE = "certificate.json"
"""What the writer of a folder certifies about its tensors (conversion/certificates/certificate.py)."""

CARD = "model_card.md"
"""The same for people (conversion/certificates/model_card.py)."""


def refuse_overlap(out: Path, *sources: Path) -> None:
    """Refuses an output that is one of the sources, holds one, or lies in one: replacing it would eat the source."""
    out = out.resolve()
    for source in sources:
        real = source.resolve()
        if out == real or out in real.parents or real in out.parents:
            raise UserError(f"output {out} and source {source} overlap; choose another output folder")


def require_adapter(folder: Path) -> None:
    """Refuses a folder without `lora.json`, and names the adapter of a training run's folder."""
    if not (folder / "lora.json").is_file():
        inner = [name for name in ("adapter", "adapter.previous") if (folder / name / "lora.json").is_file()]
        hint = f"did you mean {folder / inner[0]}?" if inner else "give the folder OUT/adapter of a training run"
        raise UserError(f"{folder} is no adapter folder (no lora.json); {hint}")


def side_folder(model: Path) -> Path:
    """Where config.json and the tokenizer of a model lie: in it, or in the `hf/` of a NeMo checkpoint."""
    return model / SIDE if is_nemo_checkpoint(model) else model


def require_space(out: Path, needed: int) -> None:
    """Refuses to begin when the disk of `out` has less than `needed` bytes free (an old output stays until the end)."""
    parent, free = free_disk(out)
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e9:.2f} GB but {parent} has {free / 1e9:.2f} GB free; make room")


def copy_files(source: Path, files: Iterable[Path], target: Path) -> None:
    """Copies files, given relative to `source`, byte for byte."""
    for relative in files:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)


def progress(total: int, what: str) -> Any:
    """A progress bar over bytes, on stderr, silent where nobody watches."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5, disable=None)


def rate(size: int, seconds: float) -> str:
    """What was done, in words: bytes of weights, time and speed."""
    return f"{size / 1e9:.3f} GB of weights in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s"
