"""NeMo's `context/` of a checkpoint: its own description of model and tokenizer, for NeMo's loaders."""

from __future__ import annotations

from pathlib import Path

from nano3.model import Nano3Model, nano3_config  # first: it switches the CPU backend on before NeMo is imported

# isort: split

import nemo.lightning as nl
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning import io
from nemo.lightning.io.artifact import DirOrStringArtifact
from nemo.lightning.io.pl import TrainerContext

from nano3.arch import Arch
from nano3.quiet import quiet

if not hasattr(AutoTokenizer, "__io_artifacts__"):
    # NeMo 2.7.3 does this itself, but only after importing a module that transformers 5 no longer has, and without it a
    # context with a tokenizer can be neither written nor read.
    io.track_io(AutoTokenizer, artifacts=[DirOrStringArtifact("pretrained_model_name", required=False)])


def describe(hf: Path) -> Nano3Model:
    """The NeMo model of a Hugging Face folder: configuration and, if it has one, tokenizer; no weights."""
    arch = Arch.load(hf)
    tokenizer = AutoTokenizer(str(hf)) if (hf / "tokenizer_config.json").is_file() else None
    return Nano3Model(nano3_config(arch, arch.max_position_embeddings, bf16=True), tokenizer=tokenizer)


def write_context(folder: Path, hf: Path) -> None:
    """Writes NeMo's `context/`: model and tokenizer for `AutoResume`, `RestoreConfig` and `io.load_context`."""
    quiet()
    trainer = nl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    TrainerContext(model=describe(hf), trainer=trainer, extra={}).io_dump(folder, yaml_attrs=["model"])
