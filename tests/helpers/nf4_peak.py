"""Run by tests/nano3/test_nf4_step.py: the most bytes of tensors that a rank has at once, as pico's base goes into NF4
and in a training step on it.

python -m tests.helpers.nf4_peak OUT.json

-> bytes: {"held", "loading", "loading_of_all", "step", "step_of_16_bits", "step_with_copies", "largest"}

Counted are storages, from their allocation to their end, and not what the allocator reserves. Steps are counted beside
the model. Two have what must not be: `loading_of_all` reads the whole base first, and in `step_with_copies` every
dequantized weight stays alive. `largest` is the largest weight with 8 bytes a value: FP32, its cast to BF16, and that
put together of parts, or as it was read.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nano3.model import nano3_config  # first: it switches the CPU backend on

# isort: split

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nano3.arch import Arch, resolve_model
from nano3.core import packed_seq_params
from nano3.lora.lora import Nano3LoRA
from nano3.nf4 import Nf4
from nano3.nf4_base import load_in_nf4
from nano3.targets import PRESETS, select
from nano3.tensor_names import linears

FOLDER = resolve_model("pico")
ARCH = Arch.load(FOLDER)
TOKENS = 64


class Live(TorchDispatchMode):
    """Bytes of storages that were made while it is on and are alive; `peak` is the most so far. `known` were before."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._before = [tensor.untyped_storage() for tensor in known]
        self._known = set(map(id, self._before))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def build(live: Live, nf4: bool = True, all_first: bool = False) -> torch.nn.Module:
    """The model in BF16 with adapters; notes the peak of loading in `live`."""

    def load(model: Any) -> None:
        with safe_open(FOLDER / "model.safetensors", "pt") as file:

            def read(name: str) -> torch.Tensor:
                return file.get_tensor(name) + 0  # a copy, which is counted

            whole = {name: read(name) for name in file.keys()} if all_first else {}  # noqa: SIM118  # no dictionary
            load_in_nf4(model, ARCH, whole.__getitem__ if all_first else read)

    with live:
        model = nano3_config(ARCH, TOKENS, True, load_base=load if nf4 else None).configure_model(None)
    return Nano3LoRA(modules=select(ARCH, list(PRESETS["all"]), "shared"), rank=4, alpha=8.0)(model)


def step(model: torch.nn.Module) -> int:
    """The most bytes that a forward and backward pass has beside the model."""
    tokens = torch.arange(TOKENS)[None] + 20
    bounds = {"cu_seqlens": torch.tensor([0, TOKENS]).int(), "max_seqlen": torch.tensor(TOKENS)}
    with Live([*model.parameters(), *model.buffers()]) as live:
        losses = model(
            input_ids=tokens, position_ids=torch.arange(TOKENS)[None], attention_mask=None, labels=tokens,
            packed_seq_params=packed_seq_params(bounds, 1),
        )  # fmt: skip
        losses.sum().backward()
    model.zero_grad()
    return live.peak


@contextmanager
def copies_that_stay() -> Iterator[None]:
    """Every dequantized weight is alive until the end."""
    values, kept = Nf4.values, []

    def keep(self: Nf4, dtype: torch.dtype) -> torch.Tensor:
        kept.append(values(self, dtype))
        return kept[-1]

    with patch.object(Nf4, "values", keep):
        yield


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    live, other = Live(), Live()
    model = build(live)
    build(other, all_first=True)
    found = {"held": live.now, "loading": live.peak, "loading_of_all": other.peak}
    step(model)  # what is made once
    found |= {"step": step(model), "step_of_16_bits": step(build(Live(), nf4=False))}
    with copies_that_stay():
        found["step_with_copies"] = step(model)
    shapes = (linear for number in range(len(ARCH.layers)) for linear in linears(ARCH, number))
    found["largest"] = 8 * max(linear.rows * linear.width for linear in shapes)
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
