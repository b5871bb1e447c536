"""Adapters of the embedding and of the output layer, split by vocabulary rows over tensor-parallel ranks.

Both weights are (vocabulary, hidden), and so is the delta `scale` * B @ A with A (rank, hidden) and B (vocabulary,
rank). Of the embedding a token looks up its row of B; the output layer is an ordinary column-parallel layer. Padded
rows have no tokens and no probability, hence no gradient: their B stays zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from nemo.lightning.pytorch.callbacks.peft import AdapterWrapper
from torch import nn

from nano3.lora.adapters import AdaptedLinear, AdapterOptions, DenseAdapter, Sharded, dense_shards
from nano3.lora.dora import MAGNITUDE, Decomposed, Part, scale_of

_SPLIT = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}


def lookup(table: VocabParallelEmbedding, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of `weight` (local vocabulary, n), split as `table` is: (b, s) -> (b, s, n), or (s / tp, b, n) where `table`
    scatters along the sequence."""
    elsewhere = (tokens < table.vocab_start_index) | (tokens >= table.vocab_end_index)
    found = F.embedding((tokens - table.vocab_start_index).masked_fill(elsewhere, 0), weight)
    found = found.masked_fill(elsewhere[..., None], 0)
    if table.reduce_scatter_embeddings:
        return reduce_scatter_to_sequence_parallel_region(found.transpose(0, 1).contiguous(), group=table.tp_group)
    return reduce_from_tensor_model_parallel_region(found, group=table.tp_group)


class EmbeddingAdapter(Decomposed):
    """Of a vocabulary-parallel embedding. A starts like other layers' A, so that a step moves a row of the embedding as
    far, relatively, as a row of a linear layer; dropout has no place before a lookup.
    """

    def __init__(self, base: VocabParallelEmbedding, config: Any, options: AdapterOptions) -> None:
        super().__init__()
        self.scale = options.scale
        self.linear_in = nn.Linear(
            base.embedding_dim,
            options.rank,
            bias=False,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
        )
        # Every rank has the whole A and, under sequence parallelism, some of the tokens.
        self.linear_in.weight.sequence_parallel = base.reduce_scatter_embeddings  # type: ignore[attr-defined]
        self.linear_out = VocabParallelEmbedding(
            base.num_embeddings,
            options.rank,
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=base.reduce_scatter_embeddings,
            config=config,
            tp_group=base.tp_group,
        )
        if options.dora:
            self.add_magnitude(base, **_SPLIT)

    def parts(self, base: Any) -> list[Part]:
        """Some rows of the vocabulary, whole."""
        return [(base.weight, self.linear_in.weight.detach(), self.linear_out.weight.detach())]

    def forward(self, tokens: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """The adapted rows for `row`, the base's rows of the tokens; the length is that of the row just made."""
        delta = lookup(self.linear_out, self.linear_out.weight, tokens) @ self.linear_in.weight * self.scale
        if self.magnitude is None:
            return row + delta
        made = row.float() + delta
        lengths = made.detach().norm(dim=-1, keepdim=True) * (row != 0).any(-1, keepdim=True)
        magnitude = lookup(self.linear_out, self.magnitude[:, None], tokens)
        return (made * scale_of(magnitude, lengths)).to(row.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> Sharded:
        """A whole, B and the magnitude split by vocabulary rows."""
        del metadata
        tensors = {"linear_in.weight": self.linear_in.weight, "linear_out.weight": self.linear_out.weight}
        if self.magnitude is not None:
            tensors[MAGNITUDE] = self.magnitude
        axes = {"linear_out.weight": 0, MAGNITUDE: 0}
        return _pads(dense_shards(tensors, prefix, axes, sharded_offsets), prefix)


class AdaptedEmbedding(AdapterWrapper):
    """The embedding and its adapter."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(b, s) -> (b, s, hidden), or (s / tp, b, hidden) under sequence parallelism."""
        return self.adapter(tokens, self.to_wrap(tokens))


class OutputAdapter(DenseAdapter):
    """Of the output layer: as long as its vocabulary, which is padded to fit tensor parallelism."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> Sharded:
        """As other layers', and another padding may load it."""
        return _pads(super().sharded_state_dict(prefix, sharded_offsets, metadata), prefix)


class AdaptedOutput(AdaptedLinear):
    """The output layer and its adapter. Padded logits are masked by the layer itself and stay: adding to the dtype's
    lowest value does not raise it, and DoRA leaves rows of zeros as they are."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, Any]:
        """(s, b, hidden) -> (s, b, vocabulary), this rank's part of it or, where it is asked for, all of it."""
        out, bias = super().forward(x, weight=weight, runtime_gather_output=False)
        gather = self.to_wrap.gather_output if runtime_gather_output is None else runtime_gather_output
        return (gather_from_tensor_model_parallel_region(out) if gather else out), bias


def _pads(state: Sharded, prefix: str) -> Sharded:
    """Lets the tensors with a row for each token load from a checkpoint with other padding."""
    for key in (f"{prefix}linear_out.weight", prefix + MAGNITUDE):
        if key in state:
            state[key].allow_shape_mismatch = True
    return state
