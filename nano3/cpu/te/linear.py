"""Linear, LayerNormLinear and GroupedLinear of Transformer Engine in plain PyTorch.

Shapes: input (sequence, batch, in) or (tokens, in). With `sequence_parallel` the input of a column-parallel layer and
the output of a row-parallel one hold sequence / TP positions. Saved for backward as in the original: input and weight
(LayerNormLinear: input, normalized input, weight; its gathered copy is not saved but gathered again).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from nano3.cpu.products import product
from nano3.cpu.te.base import TransformerEngineBaseModule, initialize, refuse
from nano3.cpu.te.norm import rms_norm


def _mappings() -> Any:
    from megatron.core.tensor_parallel import mappings  # imports Transformer Engine, so not at the top

    return mappings


class _Product(torch.autograd.Function):
    """x Wᵀ over the last dimension, as one matrix product into a tensor of its own, which adapters may add to.

    Left to itself PyTorch computes the first layer, where the embedding's transposed output meets a frozen weight,
    token by token. Saves the weight, and the input where the weight is trained.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = product(grads[0], weight.t()) if ctx.needs_input_grad[0] else None
        dweight = None if x is None else torch.mm(grads[0].flatten(0, -2).t(), x.flatten(0, -2))
        return dx, dweight


def _mark_parallel(weight: Any, parallel_mode: str | None) -> None:
    """Marks a weight as Transformer Engine marks every one, split or not: Megatron-Core's gradient norm counts what is
    marked on all tensor-parallel ranks, and experts are told to be split by nobody while each rank has its own."""
    weight.tensor_model_parallel = True
    weight.partition_dim = 1 if parallel_mode == "row" else 0
    weight.partition_stride = 1


class _ParallelLinear(TransformerEngineBaseModule):
    """Weight (out, in), split by rows (`column`) or columns (`row`) over the tensor-parallel group."""

    def _build(
        self,
        shape: tuple[int, int],
        parallel: tuple[str | None, int, Any, bool],
        init: tuple[Callable | None, Callable | None, str | None],
        bias: bool,
        factory: dict[str, Any],
    ) -> None:
        self.parallel_mode, self.tp_size, self.tp_group, self.sequence_parallel = parallel
        self.sequence_parallel = self.sequence_parallel and self.tp_size > 1
        self.out_features, self.in_features = shape
        if self.parallel_mode == "column":
            self.out_features //= self.tp_size
        elif self.parallel_mode == "row":
            self.in_features //= self.tp_size
        self.weight = Parameter(torch.empty(self.out_features, self.in_features, **factory))
        initialize(self.weight, *init)
        _mark_parallel(self.weight, self.parallel_mode)
        self.use_bias = bias
        self.bias = Parameter(torch.zeros(self.out_features, **factory)) if bias else None

    @property
    def _communicates(self) -> bool:
        return self.tp_size > 1 and self.tp_group is not None and dist.is_initialized()

    def _enter(self, inp: torch.Tensor) -> torch.Tensor:
        """Input of a column-parallel layer: gathered along the sequence, or with its gradient summed over TP."""
        if self.parallel_mode != "column" or not self._communicates:
            return inp
        if self.sequence_parallel:
            return _mappings().gather_from_sequence_parallel_region(inp, group=self.tp_group)
        return _mappings().copy_to_tensor_model_parallel_region(inp, group=self.tp_group)

    def _leave(self, out: torch.Tensor) -> torch.Tensor:
        """Output of a row-parallel layer: summed over TP, scattered along the sequence under sequence parallel."""
        if self.parallel_mode != "row" or not self._communicates:
            return out
        if self.sequence_parallel:
            return _mappings().reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return _mappings().reduce_from_tensor_model_parallel_region(out, group=self.tp_group)

    def _finish(self, out: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.bias is None:
            return (out, torch.empty(0, dtype=out.dtype, device=out.device)) if self.return_bias else out
        return (out, self.bias) if self.return_bias else out + self.bias


class Linear(_ParallelLinear):
    """y = x Wᵀ + b over a tensor-parallel group; signature of transformer_engine.pytorch.Linear 2.10."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        refuse("Linear", fuse_wgrad_accumulation=fuse_wgrad_accumulation)
        self.return_bias = return_bias
        self._build(
            (out_features, in_features),
            (parallel_mode, tp_size, tp_group, sequence_parallel),
            (init_method, get_rng_state_tracker, rng_tracker_name),
            bias,
            {"dtype": params_dtype, "device": device},
        )

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        del is_first_microbatch  # chooses when FP8 weights are cast again
        return self._finish(self._leave(_Product.apply(self._enter(inp), self.weight)))


class LayerNormLinear(_ParallelLinear):
    """RMSNorm, then a linear layer; signature of transformer_engine.pytorch.LayerNormLinear 2.10.

    With `return_layernorm_output` the normalized input comes back too: gathered along the sequence when
    `return_layernorm_output_gathered` is set under sequence parallel (its gradient then joins the layer's own before
    the reduce-scatter), else as it is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-05,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        refuse(
            "LayerNormLinear",
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            zero_centered_gamma=zero_centered_gamma,
            LayerNorm=normalization != "RMSNorm",
        )
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.return_bias = return_bias
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered
        factory = {"dtype": params_dtype, "device": device}
        self.layer_norm_weight = Parameter(torch.ones(in_features, **factory))  # type: ignore[arg-type]
        self._build(
            (out_features, in_features),
            (parallel_mode, tp_size, tp_group, sequence_parallel),
            (init_method, get_rng_state_tracker, None),
            bias,
            factory,
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        del is_first_microbatch
        normalized = rms_norm(inp, self.layer_norm_weight, self.eps)
        entered = self._enter(normalized)
        out = self._finish(self._leave(_Product.apply(entered, self.weight)))
        if not self.return_layernorm_output:
            return out
        gathered = self.return_layernorm_output_gathered and self.sequence_parallel
        returned = entered if gathered else normalized
        return (*out, returned) if isinstance(out, tuple) else (out, returned)


class _GroupedProduct(torch.autograd.Function):
    """The experts' products, each written straight to its rows of the output, and in backward of the gradient.

    Saves the weights, and the input where a weight is trained.
    """

    @staticmethod
    def forward(ctx: Any, inp: torch.Tensor, rows: list[int], *weights: torch.Tensor) -> torch.Tensor:
        out = inp.new_empty(inp.shape[0], weights[0].shape[0])
        for x, y, weight in zip(inp.split(rows), out.split(rows), weights, strict=True):
            torch.mm(x, weight.t(), out=y)
        ctx.rows = rows
        ctx.save_for_backward(inp if any(ctx.needs_input_grad[2:]) else None, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        inp, *weights = ctx.saved_tensors
        dout = grads[0].split(ctx.rows)
        dinp = grads[0].new_empty(grads[0].shape[0], weights[0].shape[1])
        for dy, dx, weight in zip(dout, dinp.split(ctx.rows), weights, strict=True):
            torch.mm(dy, weight, out=dx)
        if inp is None:
            return dinp, None, *(None,) * len(weights)
        return dinp, None, *(dy.t() @ x for dy, x in zip(dout, inp.split(ctx.rows), strict=True))


class GroupedLinear(TransformerEngineBaseModule):
    """One linear layer per expert, over tokens sorted by expert; signature of Transformer Engine 2.10's GroupedLinear.

    Input (tokens, in) with `m_splits[i]` rows for expert i; parameters `weight0`, `weight1`, ... of (out, in). An
    expert without tokens takes part with zero rows, so its weights keep a (zero) gradient, as on GPUs.
    """

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        # Token exchange belongs to Megatron-Core's dispatcher: the original ignores sequence_parallel here as well.
        del sequence_parallel, ub_name
        refuse(
            "GroupedLinear",
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            bias=bias,
            return_bias=return_bias,
            tensor_parallel=tp_size > 1,
        )
        self.num_gemms, self.tp_group, self.tp_size = num_gemms, tp_group, tp_size
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.return_bias, self.parallel_mode = bias, return_bias, parallel_mode
        for i in range(num_gemms):
            weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            initialize(weight, init_method, get_rng_state_tracker, rng_tracker_name)
            _mark_parallel(weight, parallel_mode)
            setattr(self, f"weight{i}", weight)

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        del is_first_microbatch
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        return _GroupedProduct.apply(inp, [int(rows) for rows in m_splits], *weights)
