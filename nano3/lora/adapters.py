"""The adapters of linear layers: dense ones, one for all routed experts of a layer, one for each expert.

Every adapter has `linear_in` (A) and `linear_out` (B); the delta of its layer is `scale` * B @ A, and under DoRA
(`nano3.lora.dora`) it has a `magnitude` too. Shapes below are local: of this rank's rows, columns or experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
from megatron.core.ssm.mamba_mixer import MambaMixer, _split_tensor_factory
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter, get_adapter_attributes_from_linear
from torch import nn

from nano3.lora.delta import add_product, projected
from nano3.lora.dora import MAGNITUDE, Decomposed, Part
from nano3.lora.dropout import InputDropout

Sharded = dict[str, Any]


@dataclass(frozen=True)
class AdapterOptions:
    """How one adapter is made: its rank, the factor on B @ A, dropout on its input, DoRA or not."""

    rank: int
    scale: float
    dropout: float = 0.0
    dora: bool = False


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
        self.scale = options.scale
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
            return out + self(x).reshape(out.shape)
        x = self.dropout(x)
        if not self.disable_sequence_parallel_comm:
            x = gather_from_sequence_parallel_region(x)
        if ranks == 1:
            low = projected(x, self.linear_in.weight)
        else:
            low, _ = self.linear_in(x)
            low = copy_to_tensor_model_parallel_region(low, group=self.linear_out.tp_group)
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


class ExpertsAdapter(Decomposed):
    """What adapters of routed experts have in common. Input: tokens sorted by expert, `splits[i]` of local expert i."""

    def __init__(self, options: AdapterOptions) -> None:
        super().__init__()
        self.scale = options.scale
        self.dropout = InputDropout(options.dropout, "experts")

    def _finish(self, base: Any, dora: bool) -> None:
        if dora:
            self.add_magnitude(base, **_PER_EXPERT)

    def _magnitude_shards(self, prefix: str) -> Sharded:
        if self.magnitude is None:
            return {}
        ranks = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_model_parallel_world_size()
        replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        key = prefix + MAGNITUDE
        return {key: ShardedTensor.from_rank_offsets(key, self.magnitude, (0, *ranks), replica_id=replica)}


_PER_EXPERT = {"allreduce": False, "tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
"""Attributes of a parameter of one expert. `allreduce=False`: its gradient is summed over exactly the ranks that hold
a replica of the expert (Megatron-Core's expert data parallel group, which spans tensor-parallel ranks when the experts
are not split); over the data-parallel group, different experts would be mixed. `tensor_model_parallel`: every rank of
the expert model parallel group counts its own in the gradient's norm."""


class SharedExpertsAdapter(ExpertsAdapter):
    """One adapter for all routed experts of a layer, whole on every rank.

    Its gradient is the sum over all tokens of all experts, wherever they are: the tokens of other expert-parallel ranks
    arrive through the data-parallel reduction (`allreduce=True`: that group spans the expert ranks), those of other
    tensor-parallel ranks through Megatron-Core's reduction of sequence-parallel parameters.

    Under expert tensor parallelism a rank has a slice of every expert, and uses the slice of A or B that goes with it:
    rows of B where the experts' output is split, columns of A where their input is. Each token then meets each slice
    on one rank only, and the same two reductions add the slices' gradients up.
    """

    def __init__(self, base: Any, options: AdapterOptions) -> None:
        super().__init__(options)
        settings = {"bias": False, "dtype": base.config.params_dtype, "device": torch.cuda.current_device()}
        ranks, rank = base._tp_group.size(), base._tp_group.rank()
        row_parallel = isinstance(base, TERowParallelGroupedLinear)
        whole_in, whole_out = base.in_features, base.out_features
        self.columns = self.rows = slice(None)
        if ranks > 1 and row_parallel:
            whole_in *= ranks
            self.columns = slice(rank * base.in_features, (rank + 1) * base.in_features)
        elif ranks > 1:
            whole_out *= ranks
            self.rows = slice(rank * base.out_features, (rank + 1) * base.out_features)
        self.linear_in = nn.Linear(whole_in, options.rank, **settings)
        self.linear_out = nn.Linear(options.rank, whole_out, **settings)
        nn.init.zeros_(self.linear_out.weight)
        for parameter in self.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]
            parameter.sequence_parallel = base.config.sequence_parallel  # type: ignore[attr-defined]
        self._finish(base, options.dora)

    def add_to(self, out: torch.Tensor, x: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
        """(tokens, out), which may be overwritten, with the delta for (tokens, in) added; of the local slices."""
        del splits  # one adapter for all experts
        low = projected(self.dropout(x), self.linear_in.weight[:, self.columns])
        return add_product(out, low, self.linear_out.weight[self.rows], self.scale)

    def parts(self, base: Any) -> list[Part]:
        """One for every local expert, all with the same factors."""
        low, high = self.linear_in.weight.detach(), self.linear_out.weight.detach()
        return [(getattr(base, f"weight{i}"), low, high) for i in range(base.num_gemms)]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> Sharded:
        """Both matrices whole; replicas on every tensor- and data-parallel rank, of which one writes."""
        del metadata  # names the groups of the experts around it; the replicas are over the dense model's groups
        names = ("linear_in.weight", "linear_out.weight")
        whole = {name: self.get_parameter(name) for name in names}
        return dense_shards(whole, prefix, {}, sharded_offsets) | self._magnitude_shards(prefix)


class EachExpertAdapter(ExpertsAdapter):
    """One adapter for each routed expert of a layer, on the ranks that hold the expert (expert tensor parallel 1).

    A and B are grouped linear layers like the experts' own, `weight0`, `weight1`, ... of (rank, in) and (out, rank): on
    GPUs Transformer Engine's grouped GEMMs, and in checkpoints tensors (experts, rank, in) and (experts, out, rank)
    that any expert-parallel size loads.
    """

    def __init__(self, base: Any, options: AdapterOptions) -> None:
        super().__init__(options)
        self.linear_in = self._grouped(base, base.in_features, options.rank)
        self.linear_out = self._grouped(base, options.rank, base.out_features)
        for parameter in self.parameters():
            for name, value in _PER_EXPERT.items():
                setattr(parameter, name, value)
        self._finish(base, options.dora)

    @staticmethod
    def _grouped(base: Any, in_features: int, out_features: int) -> TEColumnParallelGroupedLinear:
        return TEColumnParallelGroupedLinear(
            base.num_gemms,
            in_features,
            out_features,
            config=base.config,
            init_method=nn.init.zeros_,  # A is filled by the caller
            bias=False,
            skip_bias_add=True,
            is_expert=True,
            pg_collection=base._pg_collection,
        )

    def forward(self, x: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        low, _ = self.linear_in(self.dropout(x), splits)
        return self.linear_out(low * self.scale, splits)[0]

    def add_to(self, out: torch.Tensor, x: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
        """(tokens, out) with the delta for (tokens, in) added."""
        return out + self(x, splits)

    def parts(self, base: Any) -> list[Part]:
        """One for every local expert."""
        names = [f"weight{i}" for i in range(base.num_gemms)]
        return [
            (getattr(base, n), getattr(self.linear_in, n).detach(), getattr(self.linear_out, n).detach()) for n in names
        ]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> Sharded:
        """Keys of the whole model's experts, `linear_in.weight` (experts, rank, in) and so on."""
        state = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        state.update(self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata))
        state = {key: value for key, value in state.items() if "_extra_state" not in key}
        return state | self._magnitude_shards(prefix)


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
