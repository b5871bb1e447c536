"""The adapters of dense linear layers, and the wrapper of every adapted one (routed experts': `expert_adapters.py`).

Every adapter has `linear_in` (A) and `linear_out` (B); the delta of its layer is `scale` * B @ A, and under DoRA
(`nano3.lora.dora`) it has a `magnitude` too. Shapes below are local: of this rank's rows or columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.ssm.mamba_mixer import MambaMixer, _split_tensor_factory
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter, get_adapter_attributes_from_linear
from torch import nn

from nano3.gate import Gate
from nano3.lora.delta import add_product, projected
from nano3.lora.dora import MAGNITUDE, Decomposed, Part
from nano3.lora.dropout import InputDropout

Sharded = dict[str, Any]


@dataclass(frozen=True)
class AdapterOptions:
    """How one adapter is made: its rank, the factor on B @ A, dropout on its input, DoRA or not, its gate if it has
    one."""

    rank: int
    scale: float
    dropout: float = 0.0
    dora: bool = False
    gate: Gate | None = None


class DenseAdapter(ParallelLinearAdapter, Decomposed):
    """NeMo's adapter of a column- or row-parallel layer.

    A is split along the rank (column-parallel layers) or the input (row-parallel), B along the output. `sections` are
    the local rows of each part of in_proj's B and magnitude.
    """

    linear_in: Any
    linear_out: Any
    sections: tuple[tuple[str, int], ...] = ()

    def __init__(self, base: Any, path: str, parent: nn.Module, options: AdapterOptions) -> None:
        row_parallel, in_features, out_features, no_gather, parallel = get_adapter_attributes_from_linear(base)
        ParallelLinearAdapter.__init__(
            self,
            in_features,
            out_features,
            options.rank,
            base_linear_name=path,
            activation="identity",
            column_init_method="zero",  # A is filled by the caller
            row_init_method="zero",
            input_is_parallel=row_parallel,
            dropout_position="pre",  # see `InputDropout`
            model_parallel_config=base.config,
            alpha=options.scale * options.rank,
            disable_sequence_parallel_comm=no_gather,
            base_linear_is_parallel=parallel,
        )
        self.scale, self.gate = options.scale, options.gate
        part = row_parallel or (base.config.sequence_parallel and not no_gather)  # of the features, or the positions
        self.dropout = InputDropout(options.dropout, "part" if part else "whole")
        if isinstance(parent, MambaMixer) and path.endswith("in_proj"):
            states = parent.ngroups_local_tp * parent.d_state
            inner, heads = parent.d_inner_local_tp, parent.nheads_local_tp
            self.sections = (("z", inner), ("x", inner), ("B", states), ("C", states), ("dt", heads))
        if options.dora:
            # Behind a row-parallel layer every rank has all rows of some tokens; else all tokens of some rows.
            replicated = {"sequence_parallel": base.config.sequence_parallel}
            split = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
            self.add_magnitude(base, **(replicated if row_parallel else split))

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The layer's output `out`, which may be overwritten, with the delta for its input added.

        The same steps as NeMo's `forward`, up to the product with B, and on one rank up to that with A. Where ranks
        still have to exchange the product with B, between slices of a row-parallel layer, NeMo's `forward` it is.
        """
        ranks = self.linear_out.tp_group.size()
        if ranks > 1 and self.linear_out.gather_output:
            # Here, where every rank has all positions: behind the product with B it may have a slice of them.
            return out + self(self.gate(x) if self.gate else x).reshape(out.shape)
        x = self.dropout(x)
        if not self.disable_sequence_parallel_comm:
            x = gather_from_sequence_parallel_region(x)
        if ranks == 1:
            low = projected(x, self.linear_in.weight)
        else:
            low, _ = self.linear_in(x)
            low = copy_to_tensor_model_parallel_region(low, group=self.linear_out.tp_group)
        if self.gate:
            low = self.gate(low)
        return add_product(out, low, self.linear_out.weight, self.scale)

    def parts(self, base: Any) -> list[Part]:
        """Of a row-parallel layer some columns of all rows, of a column-parallel layer some whole rows."""
        low, high = self.linear_in.weight.detach(), self.linear_out.weight.detach()
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            if self.input_is_parallel:
                high = gather_from_sequence_parallel_region(high, group=group)  # along axis 0
            else:
                low = gather_from_sequence_parallel_region(low, group=group)
        return [(base.weight, low, high)]

    def over_columns(self, squares: torch.Tensor) -> torch.Tensor:
        """Summed over tensor-parallel ranks where they hold slices of the input."""
        group = parallel_state.get_tensor_model_parallel_group()
        if self.input_is_parallel and group.size() > 1:
            torch.distributed.all_reduce(squares, group=group)
        return squares

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> Sharded:
        """`linear_in.weight` split along the rank (column) or the input (row), the others along the output."""
        state = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        state.update(self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata))
        state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
        keys = [f"{prefix}linear_out.weight"]
        if self.magnitude is not None:
            axes = {} if self.input_is_parallel else {MAGNITUDE: 0}
            state.update(dense_shards({MAGNITUDE: self.magnitude}, prefix, axes, sharded_offsets))
            keys.append(prefix + MAGNITUDE)
        for key in keys if self.sections else ():
            names, rows = zip(*self.sections, strict=True)
            state[key] = _split_tensor_factory(state[key], list(rows), list(names), 0)
        return state


class AdaptedLinear(LoRALinear):
    """A linear layer and its adapter: NeMo's wrapper, which also tells experts' adapters whose tokens they get."""

    def forward(self, x: torch.Tensor, *splits: Sequence[int], **settings: Any) -> tuple[torch.Tensor, Any]:
        """The layer's output with the delta added and, under DoRA, its rows rescaled; and the layer's bias."""
        out, bias, entered = self.base_linear_forward(x, *splits, **settings)
        out = self.adapter.add_to(out, entered.contiguous(), *splits)
        if self.adapter.magnitude is not None:
            out = rescale(out, self.adapter.row_scale(self.to_wrap), *splits)
        return out, bias


def rescale(out: torch.Tensor, row_scale: torch.Tensor, splits: Sequence[int] | None = None) -> torch.Tensor:
    """(..., out) times g, (out,) or (experts, out) with `splits` tokens of each expert; multiplied in FP32."""
    if splits is None:
        return (out * row_scale).to(out.dtype)
    parts = zip(out.split(list(splits)), row_scale, strict=True)
    return torch.cat([part * factor for part, factor in parts]).to(out.dtype)


def dense_shards(tensors: dict[str, Any], prefix: str, axes: dict[str, int], offsets: tuple) -> Sharded:
    """Shards over the dense model's groups, whatever groups the module around the adapter has."""
    return make_sharded_tensors_for_checkpoint(
        tensors,
        prefix,
        axes,
        offsets,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
