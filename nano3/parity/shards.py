"""Tensors of a model that is cut over ranks: filled from whole ones, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch

from nano3.parity.case import VOCABULARY, Case, is_vocabulary
from nano3.sharded_parts import parts_of, place
from nano3.tensor_names import megatron_tensors


class Shard(NamedTuple):
    """A part of the whole tensor `key` of `shape`, at `where`."""

    key: str
    shape: tuple[int, ...]
    where: tuple[Any, ...]
    value: torch.Tensor


@torch.no_grad()
def fill(model: torch.nn.Module, case: Case) -> None:
    """Gives this rank its parts of the case's weights."""
    for part in parts_of(model):
        part.data.copy_(case.whole(part.key, part.global_shape)[place(part)])


def hf_reader(case: Case) -> Callable[[str], torch.Tensor]:
    """The case's weights whole, by Hugging Face's names: what `fill` cuts by Megatron's."""
    tensors = list(megatron_tensors(case.arch))

    @cache
    def read(name: str) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        for tensor in (tensor for tensor in tensors if any(block.name == name for block in tensor.blocks)):
            sizes = [block.count for block in tensor.blocks]
            rows = case.whole(tensor.key, tensor.shape).reshape(-1, *tensor.row_shape).split(sizes)
            found |= {b.start: part for b, part in zip(tensor.blocks, rows, strict=True) if b.name == name}
        return torch.cat([found[start] for start in sorted(found)])

    return read


@torch.no_grad()
def shards(model: torch.nn.Module, adapters: bool) -> list[Shard]:
    """Copies of this rank's parts of all adapters, or of all parameters."""
    return [
        Shard(part.key, tuple(part.global_shape), place(part), part.data.detach().clone())
        for part in parts_of(model)
        if (".adapter." in part.key if adapters else not part.key.endswith("expert_bias"))
    ]


def assemble(ranks: Iterable[list[Shard]]) -> tuple[dict[str, torch.Tensor], float]:
    """Whole tensors from the shards of all ranks, and the largest difference between two copies of one value.

    Raises:
        ValueError: values that no rank has.
    """
    whole: dict[str, torch.Tensor] = {}
    held: dict[str, torch.Tensor] = {}
    drift = 0.0
    for key, shape, where, value in (shard for shards in ranks for shard in shards):
        if key not in whole:
            whole[key], held[key] = torch.zeros(shape, dtype=value.dtype), torch.zeros(shape, dtype=torch.bool)
        seen = held[key][where]
        drift = max(drift, float(torch.where(seen, (whole[key][where] - value).abs(), 0).max()))
        whole[key][where] = torch.where(seen, whole[key][where], value)
        held[key][where] = True
    missing = sorted(key for key, mask in held.items() if not mask.all())
    if missing:
        raise ValueError(f"no rank holds all of {', '.join(missing[:3])}")
    return {key: value[:VOCABULARY] if is_vocabulary(key) else value for key, value in whole.items()}, drift
