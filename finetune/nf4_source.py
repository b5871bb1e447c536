"""The base of a run with `lora.base=nf4`: read tensor by tensor from a Hugging Face folder or a NeMo checkpoint.

No rank holds the base in 16 bits, and none is written to disk: OUT/base says only which weights they are.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from megatron.core.models.mamba import MambaModel

from conversion.checkpoint.model_folder import open_model
from nano3.nf4_base import load_in_nf4

EVERY = 10.0
"""Seconds between lines that say how far it is."""


def load_base(model: MambaModel, folder: str) -> None:
    """Fills this rank's part of a model from `nano3.nf4_base.build_on_meta` with the tensors of `folder`."""
    said = time.monotonic()
    with open_model(Path(folder), as_is=True) as source:  # the launcher made sure of what is in it

        def read(name: str) -> torch.Tensor:
            nonlocal said
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                print(f"the base in NF4: at {name}", flush=True)
            return source.rows(name, 0, source.layout.entries[name].rows).to(torch.cuda.current_device())

        load_in_nf4(model, source.arch, read)
