"""Megatron-Core's frozen linear layers with weights in NF4, beneath the adapters.

A layer keeps its class's name for `isinstance`, which NeMo and the adapters ask, and its place in the model: `freeze`
turns the module into one of the subclasses below and drops its weight. Nothing of the dequantized weight outlives its
product: backward makes it again. (Transformer Engine's own layers would keep it, once for every micro batch.)

Shapes: input (sequence, batch, in), or (tokens, in) of experts; weights (out, in); of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nano3.cpu.products import product
from nano3.nf4 import Nf4


class Nf4Weight(nn.Module):
    """A weight (out, in) made of parts of tensors that were quantized whole, from top to bottom."""

    def __init__(self, parts: Sequence[Nf4]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight, a tensor of its own."""
        parts: Any = self.parts
        values = [part.values(dtype) for part in parts]
        return values[0] if len(values) == 1 else torch.cat(values)


class _Product(torch.autograd.Function):
    """x Wᵀ. Saves nothing but who has the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Nf4Weight) -> Tensor:
        ctx.weight = weight
        return product(x, weight.values(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dx = product(grads[0], ctx.weight.values(grads[0].dtype).t()) if ctx.needs_input_grad[0] else None
        return dx, None


class _GroupedProduct(torch.autograd.Function):
    """The experts' products, one after the other: one dequantized expert at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], weights: list[Nf4Weight]) -> Tensor:
        ctx.rows, ctx.weights = rows, weights
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for tokens, y, weight in zip(x.split(rows), out.split(rows), weights, strict=True):
            if len(tokens):
                torch.mm(tokens, weight.values(x.dtype).t(), out=y)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dx = grads[0].new_empty(grads[0].shape[0], ctx.weights[0].shape[1])
        for dy, part, weight in zip(grads[0].split(ctx.rows), dx.split(ctx.rows), ctx.weights, strict=True):
            if len(dy):
                torch.mm(dy, weight.values(dy.dtype), out=part)
        return dx, None, None


class _Dense:
    """What dense layers have in common; `codes` is the weight."""

    config: Any
    codes: Nf4Weight

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew: for the lengths of DoRA."""
        return self.codes.values(self.config.params_dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """A weight without values: Megatron-Core's Mamba mixer cuts in_proj's into sections, and insists that there is
        one. No base is in our checkpoints."""
        del metadata
        empty = torch.empty(self.codes.shape, dtype=self.config.params_dtype, device="meta")
        return make_sharded_tensors_for_checkpoint(
            {"weight": empty},
            prefix,
            {"weight": 1 if isinstance(self, TERowParallelLinear) else 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    def _entered(self, x: Tensor) -> Tensor:
        """A column-parallel layer's input: gathered along the sequence, or with its gradient summed over ranks."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return x
        if self.config.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=group)


class Nf4ColumnLinear(_Dense, TEColumnParallelLinear):
    """Rows of the weight are split over tensor-parallel ranks."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The output, and no bias."""
        return _Product.apply(self._entered(x), self.codes), None


class Nf4NormColumnLinear(_Dense, TELayerNormColumnParallelLinear):
    """The same behind a norm, `norm`, whose output comes back too where adapters ask for it."""

    def forward(self, x: Tensor) -> tuple[Any, None]:
        """The output, or the output and the normalized input; and no bias."""
        normalized = self.norm(x)
        entered = self._entered(normalized)
        out = _Product.apply(entered, self.codes)
        if not self.return_layernorm_output:
            return out, None
        gathered = self.return_layernorm_output_gathered and self.config.sequence_parallel
        return (out, entered if gathered else normalized), None


class Nf4RowLinear(_Dense, TERowParallelLinear):
    """Columns of the weight are split over tensor-parallel ranks, whose outputs are added up."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The output, and no bias."""
        out, group = _Product.apply(x, self.codes), parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1 and self.config.sequence_parallel:
            out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=group)
        elif group.size() > 1:
            out = mappings.reduce_from_tensor_model_parallel_region(out, group=group)
        return out, None


class _Grouped:
    """What routed experts' layers have in common; `codes` are the weights of the local experts."""

    config: Any
    codes: nn.ModuleList

    def __getattr__(self, name: str) -> Any:
        """`weight0`, `weight1`, ..., dequantized anew: for the lengths of DoRA."""
        if name.startswith("weight") and name[6:].isdigit():
            codes: Any = self.codes[int(name[6:])]
            return codes.values(self.config.params_dtype)
        return super().__getattr__(name)  # type: ignore[misc]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing: no base is in our checkpoints."""
        del prefix, sharded_offsets, metadata
        return {}

    def forward(self, x: Tensor, splits: Sequence[int] | Tensor) -> tuple[Tensor, None]:
        """(tokens, out) of tokens sorted by expert, `splits[i]` of expert i; and no bias."""
        return _GroupedProduct.apply(x, [int(rows) for rows in splits], list(self.codes)), None


class Nf4ColumnGroupedLinear(_Grouped, TEColumnParallelGroupedLinear):
    """Each expert's rows are split over expert-tensor-parallel ranks."""


class Nf4RowGroupedLinear(_Grouped, TERowParallelGroupedLinear):
    """Each expert's columns are; Megatron-Core's dispatcher adds the outputs up."""


_FROZEN = {
    TEColumnParallelLinear: Nf4ColumnLinear,
    TELayerNormColumnParallelLinear: Nf4NormColumnLinear,
    TERowParallelLinear: Nf4RowLinear,
    TEColumnParallelGroupedLinear: Nf4ColumnGroupedLinear,
    TERowParallelGroupedLinear: Nf4RowGroupedLinear,
}


def can_freeze(module: nn.Module) -> bool:
    """Whether `freeze` takes it."""
    return type(module) in _FROZEN


def freeze(module: Any, weights: Sequence[Nf4Weight]) -> None:
    """Turns a linear layer without bias into one with these weights: of grouped experts one for each, else one."""
    kind = _FROZEN[type(module)]
    for name in [name for name in module._parameters if name.startswith("weight")]:
        del module._parameters[name]
    if issubclass(kind, _Grouped):
        module.codes = nn.ModuleList(weights)
    else:
        (module.codes,) = weights
    if kind is Nf4NormColumnLinear:
        module.norm = TENorm(module.config, module.in_features, module.config.layernorm_epsilon)
        module.norm.weight = module._parameters.pop("layer_norm_weight")
    module.__class__ = kind
