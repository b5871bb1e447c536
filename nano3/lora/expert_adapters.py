"""The adapters of routed experts: one for all experts of a layer, or one for each.

Input: tokens sorted by expert, `splits[i]` of local expert i. Expert tensor parallelism (ETP) cuts every expert: fc1's
output, fc2's input. All ETP ranks get the same tokens; each computes the delta of its slice, and Megatron-Core's
dispatcher adds up the slices of fc2's output, and of the gradient of fc1's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.extensions.transformer_engine import TEGroupedLinear, TERowParallelGroupedLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import nn

from nano3.etp_replicas import MARK
from nano3.lora.adapters import AdapterOptions, Sharded, dense_shards
from nano3.lora.delta import add_product, projected
from nano3.lora.dora import MAGNITUDE, Decomposed, Part, scale_of
from nano3.lora.dropout import InputDropout

_PER_EXPERT = {"allreduce": False, "tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
"""Attributes of a parameter of one expert. `allreduce=False`: its gradient is summed over exactly the ranks that hold
a replica of the expert (Megatron-Core's expert data parallel group, which spans tensor-parallel ranks when the experts
are not split); over the data-parallel group, different experts would be mixed. `tensor_model_parallel`: every rank of
the expert model parallel group counts its own in the gradient's norm, unless it is marked `shared`."""


class _Scaled(torch.autograd.Function):
    """One factor on the value, another on its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.backward_factor = backward
        return x * forward if forward != 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (grads[0] * ctx.backward_factor if ctx.backward_factor != 1 else grads[0]), None, None


class ExpertsAdapter(Decomposed):
    """What both kinds have in common."""

    linear_in: Any
    linear_out: Any
    routed = True

    def __init__(self, base: Any, options: AdapterOptions) -> None:
        super().__init__()
        self.scale = options.scale
        self.group: dist.ProcessGroup = base._tp_group  # over the slices of an expert
        self.by_input = isinstance(base, TERowParallelGroupedLinear)
        self.dropout = InputDropout(options.dropout, "expert slices" if self.by_input else "experts")

    @property
    def slices(self) -> int:
        """Into how many each expert is cut."""
        return self.group.size()

    def _mark(self, parameter: nn.Parameter, *, cut: bool) -> None:
        """Tells Megatron-Core that `parameter` belongs to one expert; where ETP does not cut it, one rank counts it."""
        for name, value in _PER_EXPERT.items():
            setattr(parameter, name, value)
        parameter.shared = not cut and self.group.rank() > 0  # type: ignore[attr-defined]
        setattr(parameter, MARK, not cut)

    def _finish(self, base: Any, dora: bool) -> None:
        if dora:
            self.add_magnitude(base)
            self._mark(self.magnitude, cut=not self.by_input)  # type: ignore[arg-type]

    def over_columns(self, squares: torch.Tensor) -> torch.Tensor:
        """Summed over the slices of the input."""
        if self.by_input and self.slices > 1:
            dist.all_reduce(squares, group=self.group)
        return squares

    def row_scale(self, base: Any) -> torch.Tensor:
        """g; where ranks have slices of the input its gradient is the sum over theirs."""
        assert self.magnitude is not None
        magnitude: torch.Tensor = self.magnitude
        if self.by_input and self.slices > 1:
            magnitude = copy_to_tensor_model_parallel_region(magnitude, group=self.group)
        return scale_of(magnitude, self._lengths(base))

    def _magnitude_shards(self, prefix: str) -> Sharded:
        """(experts, out), cut by experts and, where the output is, by rows."""
        if self.magnitude is None:
            return {}
        ranks = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_model_parallel_world_size()
        copy, rows = (self.group.rank(), []) if self.by_input else (0, [(1, self.group.rank(), self.slices)])
        replica = (0, copy, parallel_state.get_expert_data_parallel_rank())
        key = prefix + MAGNITUDE
        return {key: ShardedTensor.from_rank_offsets(key, self.magnitude, (0, *ranks), *rows, replica_id=replica)}


class SharedExpertsAdapter(ExpertsAdapter):
    """One adapter for all routed experts of a layer, whole on every rank.

    Its gradient is the sum over all tokens of all experts, wherever they are: the tokens of other expert-parallel ranks
    arrive through the data-parallel reduction (`allreduce=True`: that group spans the expert ranks), those of other
    tensor-parallel ranks through Megatron-Core's reduction of sequence-parallel parameters.

    Under ETP a rank uses the slice of A or B that goes with its slice of the experts: rows of B where their output is
    split, columns of A where their input is. Each token then meets each slice on one rank only, and the same two
    reductions add the slices' gradients up.
    """

    def __init__(self, base: Any, options: AdapterOptions) -> None:
        super().__init__(base, options)
        settings = {"bias": False, "dtype": base.config.params_dtype, "device": torch.cuda.current_device()}
        rank, size = self.group.rank(), base.in_features if self.by_input else base.out_features
        mine = slice(rank * size, (rank + 1) * size)
        self.columns, self.rows = (mine, slice(None)) if self.by_input else (slice(None), mine)
        whole_in, whole_out = base.in_features, base.out_features
        self.linear_in = nn.Linear(whole_in * (self.slices if self.by_input else 1), options.rank, **settings)
        self.linear_out = nn.Linear(options.rank, whole_out * (1 if self.by_input else self.slices), **settings)
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
        """One for every local expert, all with the same factors, of the local slices."""
        low, high = self.linear_in.weight.detach()[:, self.columns], self.linear_out.weight.detach()[self.rows]
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
    """One adapter for each routed expert of a layer, on the ranks that hold the expert.

    A and B are grouped linear layers like the experts' own, `weight0`, `weight1`, ... of (rank, in) and (out, rank): on
    GPUs Transformer Engine's grouped GEMMs, and in checkpoints tensors (experts, rank, in) and (experts, out, rank)
    that any expert-parallel size loads.

    Under ETP the matrix on the side that is cut is cut, fc1's B by rows and fc2's A by columns; the other is whole on
    every rank of the group, and what enters and leaves it is whole too. Its gradient is then whole everywhere, and what
    the dispatcher adds up over the group, fc1's gradient to the input and fc2's delta, is an equal share of the whole.
    """

    def __init__(self, base: Any, options: AdapterOptions) -> None:
        super().__init__(base, options)
        inside, outside = ("row", None) if self.by_input else (None, "column")
        self.linear_in = self._grouped(base, base.in_features, options.rank, inside)
        self.linear_out = self._grouped(base, options.rank, base.out_features, outside)
        for layer, cut in ((self.linear_in, self.by_input), (self.linear_out, not self.by_input)):
            for parameter in layer.parameters():
                self._mark(parameter, cut=cut)
        self._finish(base, options.dora)

    def _grouped(self, base: Any, in_features: int, out_features: int, mode: str | None) -> TEGroupedLinear:
        """Of (in, out) features on this rank, cut over the group by `mode` "row" or "column"."""
        return TEGroupedLinear(
            base.num_gemms,
            in_features * (self.slices if mode == "row" else 1),
            out_features * (self.slices if mode == "column" else 1),
            parallel_mode=mode,
            config=base.config,
            init_method=nn.init.zeros_,  # A is filled by the caller
            bias=False,
            skip_bias_add=True,
            is_expert=True,
            pg_collection=base._pg_collection,
        )

    def forward(self, x: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        x, slices = self.dropout(x), self.slices
        if slices > 1 and not self.by_input:
            x = _Scaled.apply(x, 1.0, 1 / slices)
        low, _ = self.linear_in(x, splits)
        if slices > 1:
            exchange = (
                reduce_from_tensor_model_parallel_region if self.by_input else copy_to_tensor_model_parallel_region
            )
            low = exchange(low, group=self.group)
        delta = self.linear_out(low * self.scale, splits)[0]
        return _Scaled.apply(delta, 1 / slices, 1.0) if slices > 1 and self.by_input else delta

    def add_to(self, out: torch.Tensor, x: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
        """(tokens, out) with the delta for (tokens, in) added."""
        return out + self(x, splits)

    def parts(self, base: Any) -> list[Part]:
        """One for every local expert, of the local slices."""
        names = [f"weight{i}" for i in range(base.num_gemms)]
        return [
            (getattr(base, n), getattr(self.linear_in, n).detach(), getattr(self.linear_out, n).detach()) for n in names
        ]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> Sharded:
        """Keys of the whole model's experts, `linear_in.weight` (experts, rank, in) and so on."""
        state: Sharded = {}
        for name, axis in (("linear_in", 1 if self.by_input else None), ("linear_out", None if self.by_input else 0)):
            layer = getattr(self, name)
            axes = {} if axis is None else {f"{i}.weight": axis for i in range(layer.num_gemms)}
            state |= layer._sharded_state_dict_grouped(axes, f"{prefix}{name}.", sharded_offsets, metadata)
        state = {key: value for key, value in state.items() if "_extra_state" not in key}
        return state | self._magnitude_shards(prefix)
