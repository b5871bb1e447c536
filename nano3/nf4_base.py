"""Gives a Megatron-Core model its base weights tensor by tensor, the frozen linear layers in NF4.

Which rows and columns a rank has is what Megatron-Core's own sharded state says; this module knows no layout. A linear
layer's tensors are quantized whole, as Hugging Face has them (q, k, v and every expert apart), and then cut. So a rank
has no more than one whole tensor in 16 bits beside its part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.mamba import MambaModel
from torch import Tensor, nn

from nano3.arch import Arch
from nano3.cli import UserError
from nano3.nf4 import Nf4, quantize
from nano3.nf4_linears import Nf4Weight, can_freeze, freeze
from nano3.sharded_parts import parts_of, place
from nano3.tensor_names import Linear, MegatronTensor, linears, megatron_tensors

Read = Callable[[str], Tensor]
"""A whole tensor by its Hugging Face name, on the device where it is to be."""
Quantizer = Callable[[Tensor], Nf4]


def build_on_meta(config: Any, build: Callable[[], MambaModel]) -> MambaModel:
    """A model whose linear layers have no memory. Only while it is built: adapters that are made later have some."""
    config.init_model_with_meta_device = True
    try:
        return build()
    finally:
        config.init_model_with_meta_device = False


@torch.no_grad()
def load_in_nf4(model: MambaModel, arch: Arch, read: Read, quantizer: Quantizer = quantize) -> None:
    """Fills a model from `build_on_meta`: linear layers in NF4, everything else as it is."""
    _materialize(model)
    tensors, frozen = {tensor.key: tensor for tensor in megatron_tensors(arch)}, _frozen_keys(arch)
    for part in parts_of(model):
        if part.key not in frozen:
            _fill(tensors[part.key], part, read)
    quantize_linears(model, arch, read, quantizer)


@torch.no_grad()
def quantize_linears(model: MambaModel, arch: Arch, read: Read, quantizer: Quantizer = quantize) -> None:
    """Freezes all linear layers of this rank in NF4. Their own weights, which may be on meta, are not looked at.

    Raises:
        UserError: a tensor that NF4 cannot represent, or cannot be cut as this layout cuts it; by name.
    """
    tensors = {tensor.key: tensor for tensor in megatron_tensors(arch)}
    held: dict[str, list[ShardedTensor]] = {}
    for part in parts_of(model):
        held.setdefault(part.key, []).append(part)
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        for linear in linears(arch, number):
            keys = _keys(f"decoder.layers.{number}.{linear.weight_key}", linear)
            parts = [(tensors[key], part) for key in keys for part in held[key]]
            freeze(layer.get_submodule(linear.module), _weights(linear, parts, _Units(read, quantizer)))


class _Units:
    """The tensors of one layer in NF4, each quantized once."""

    def __init__(self, read: Read, quantizer: Quantizer) -> None:
        self._read, self._quantizer = read, quantizer
        self._whole: dict[str, Nf4] = {}

    def cut(self, name: str, start: int, count: int, columns: slice) -> Nf4:
        """Rows and columns of the tensor `name`. Raises `UserError`."""
        try:
            if name not in self._whole:
                self._whole[name] = self._quantizer(self._read(name))
            return self._whole[name].cut(start, count, columns)
        except ValueError as error:
            raise UserError(f"lora.base=nf4: {name}: {error}; choose another layout, or lora.base=original") from error


def _weights(linear: Linear, parts: list[tuple[MegatronTensor, ShardedTensor]], units: _Units) -> list[Nf4Weight]:
    """Of one layer: one for each local expert, else one; sections of in_proj one below the other."""
    found = [list(_cut(tensor, part, units)) for tensor, part in parts]
    return [Nf4Weight(cut) for cut in found] if linear.experts else [Nf4Weight([cut for cuts in found for cut in cuts])]


def _cut(tensor: MegatronTensor, part: ShardedTensor, units: _Units) -> Iterator[Nf4]:
    start, count, columns = _region(tensor, part)
    for block in tensor.rows(start, count):
        yield units.cut(block.name, block.start, block.count, columns)


def _region(tensor: MegatronTensor, part: ShardedTensor) -> tuple[int, int, slice]:
    """First row, number of rows (those behind the vocabulary left out) and columns of a part of a Megatron tensor."""
    *ahead, rows = place(part)[: part.prepend_axis_num + 1]
    columns = place(part)[part.prepend_axis_num + 1] if len(part.local_shape) > 1 else slice(0, 1)
    if tensor.experts:
        return ahead[0] * tensor.shape[1] + rows.start, rows.stop - rows.start, columns
    return rows.start, max(0, min(rows.stop, tensor.shape[0]) - rows.start), columns


def _keys(key: str, linear: Linear) -> list[str]:
    """The Megatron tensors of a linear layer's weight, whose key is `key`: one, or one for each section."""
    return [f"{key}.{section}" for section, _ in linear.sections] or [key]


def _frozen_keys(arch: Arch) -> set[str]:
    """The Megatron tensors of all weights that become NF4."""
    found = ((n, linear) for n in range(len(arch.layers)) for linear in linears(arch, n))
    return {key for n, linear in found for key in _keys(f"decoder.layers.{n}.{linear.weight_key}", linear)}


def _fill(tensor: MegatronTensor, part: ShardedTensor, read: Read) -> None:
    """Copies a part's rows; those behind the vocabulary are zeros."""
    start, count, _ = _region(tensor, part)
    part.data[count:] = 0  # of a rank with padding alone, all of them
    filled = 0
    for block in tensor.rows(start, count):
        part.data[filled : filled + block.count] = read(block.name)[block.start : block.start + block.count]
        filled += block.count


def _materialize(model: nn.Module) -> None:
    """Gives memory to what is on meta and not to be in NF4: the norms."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta and not (can_freeze(module) and name.startswith("weight")):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=torch.cuda.current_device())
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name].__dict__.update(parameter.__dict__)
