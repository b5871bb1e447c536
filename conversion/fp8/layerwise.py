"""Runs a model layer by layer: transformers' code on one layer of weights at a time, hidden states on disk.

Memory: one layer (of Nano at most 2.6 GB in BF16, a mixture-of-experts layer) and one sample's activations. Disk: the
hidden states of all samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.safetensors_layout import FP8
from nano3.hf_config import BLOCK_TYPES, DT_RANGE, read_config

PRECISE = "e_score_correction_bias"
"""What transformers keeps in FP32 whatever the dtype of the model."""
BLOCK_TOKENS = 16384
"""Of a block of hidden states, at least. A killed run does at most one again, of a layer of Nano 2 TFLOP; and a file of
88 MB does not wait for the disk as small ones would."""


class Hidden:
    """The hidden states of all samples, each (tokens, hidden_size) in `dtype`, in order; on disk, in blocks of samples.

    They start as the embeddings of `samples`, token ids (tokens,) each. A block is one file in `folder`; files change
    only as a whole, and are on the disk before anything says so.
    """

    def __init__(self, hf: HFFolder, samples: list[np.ndarray], folder: Path, dtype: torch.dtype) -> None:
        self.hf, self.folder, self.dtype = hf, folder, dtype
        self.blocks = _blocks(samples)

    def embed(self) -> None:
        """Every sample's embeddings."""
        for number, block in enumerate(self.blocks):
            self._write(self._path(number), map(self._embedded, block))

    def pass_through(self, layer: Any, first: int = 0, passed: Callable[[int], None] | None = None) -> None:
        """All blocks from `first` on through `layer` (see `build_layer`), their outputs in the inputs' place.

        `passed` gets the number of a block whose output is on the disk, but not yet in place. A run that is killed
        behind it calls `settle` with that number + 1 and goes on there; so nothing passes a layer twice.
        """
        device = next(layer.layers.parameters()).device

        def output(state: torch.Tensor) -> torch.Tensor:
            return layer(inputs_embeds=state[None].to(device), use_cache=False).last_hidden_state[0].cpu()

        with torch.no_grad():
            for number in range(first, len(self.blocks)):
                self._write(self._aside(number), map(output, self._read(number)))
                if passed is not None:
                    passed(number)
                self.settle(number + 1)

    def settle(self, passed: int) -> None:
        """Puts the output of the last of `passed` blocks in place, if it is not there."""
        if passed and self._aside(passed - 1).exists():
            os.replace(self._aside(passed - 1), self._path(passed - 1))

    def remove(self) -> None:
        """Removes the files."""
        for number in range(len(self.blocks)):
            self._path(number).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(len(self.blocks)):
            yield from self._read(number)

    def _embedded(self, sample: np.ndarray) -> torch.Tensor:
        rows = [self.hf.rows("backbone.embeddings.weight", int(token), 1) for token in sample]
        return torch.cat(rows).to(self.dtype)

    def _path(self, block: int) -> Path:
        return self.folder / f"{block}.states"

    def _aside(self, block: int) -> Path:
        return self.folder / f"{block}.states.new"

    def _read(self, block: int) -> Iterator[torch.Tensor]:
        with open(self._path(block), "rb") as file:
            for _ in self.blocks[block]:
                yield torch.from_numpy(np.load(file)).view(self.dtype)

    def _write(self, path: Path, states: Iterable[torch.Tensor]) -> None:
        with open(path, "wb") as file:
            for state in states:
                np.save(file, state.contiguous().view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())


def _blocks(samples: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Successive samples in groups that have at least BLOCK_TOKENS tokens, but for the last."""
    blocks: list[list[np.ndarray]] = []
    room = 0
    for sample in samples:
        if room <= 0:
            blocks.append([])
            room = BLOCK_TOKENS
        blocks[-1].append(sample)
        room -= len(sample)
    return blocks


def hidden_bytes(hf: HFFolder, samples: list[np.ndarray], dtype: torch.dtype) -> int:
    """Disk that the hidden states of `samples` take, with a header each; a block in work is there twice."""

    def size(some: list[np.ndarray]) -> int:
        return sum(dtype.itemsize * len(sample) * hf.arch.hidden_size + 128 for sample in some)

    return size(samples) + max(map(size, _blocks(samples)), default=0)


def build_layer(hf: HFFolder, number: int, dtype: torch.dtype) -> Any:
    """transformers' model with this layer as its only one: hidden states go in, the layer's output comes out.

    It is what `from_pretrained(dtype=...)` makes of the folder, less its clamped time step: everything in `dtype` but
    for the router's correction bias. FP8 matrices become code * scale. On the GPU where there is one.
    """
    from transformers import NemotronHConfig, NemotronHModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says for every layer that the plain formulas are slow

    raw = read_config(hf.path)
    letter = hf.arch.layers[number]
    kind = next(word for word, known in BLOCK_TYPES.items() if known == letter)
    drop = ("hybrid_override_pattern", "num_hidden_layers", "quantization_config")
    raw = {key: value for key, value in raw.items() if key not in drop}
    config = NemotronHConfig(**{**raw, "layers_block_type": [kind], "num_hidden_layers": 1})
    config._experts_implementation = "eager"  # the only one that ModelOpt can look into
    with torch.device("meta"):
        model: Any = NemotronHModel(config)
    model.norm_f = nn.Identity()
    model.layers[0].load_state_dict(_weights(hf, number, dtype), assign=True)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = DT_RANGE
    model.layers.to("cuda" if torch.cuda.is_available() else "cpu")  # the embeddings stay without weights
    return model.eval()


def plain(hf: HFFolder, name: str, start: int, count: int) -> torch.Tensor:
    """Rows of a tensor: as stored, or of an FP8 one code * scale in FP32."""
    rows = hf.rows(name, start, count)
    return rows.float() * hf.rows(f"{name}_scale", 0, 1) if hf.layout.entries[name].dtype == FP8 else rows


def _weights(hf: HFFolder, number: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The layer's state in transformers' names. Experts are stacked as they are read: never is a layer there twice."""
    prefix = f"backbone.layers.{number}."
    state: dict[str, torch.Tensor] = {}
    for name, spec in hf.arch.tensors().items():
        if not name.startswith(prefix):
            continue
        value = plain(hf, name, 0, spec.shape[0])
        if not name.endswith(PRECISE):
            value = value.to(dtype)
        short = name.removeprefix(prefix)
        if ".experts." in short:
            expert, part = short.split(".")[-3:-1]
            stack = state.setdefault(
                f"mixer.experts.{part}", torch.empty(hf.arch.n_routed_experts, *spec.shape, dtype=dtype)
            )
            stack[int(expert)] = value
        else:
            state[short] = value
    return state


def count_tokens(layer: Any, counts: torch.Tensor) -> Callable[[], None]:
    """Adds the tokens that each routed expert of the layer gets to `counts`; returns what ends it."""

    def look(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        counts.add_(torch.bincount(arguments[1].flatten(), minlength=len(counts)).cpu())

    return layer.layers[0].mixer.experts.register_forward_pre_hook(look).remove
