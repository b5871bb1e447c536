"""DotProductAttention of Transformer Engine in plain PyTorch: causal, grouped queries, packed documents.

Shapes: `sbhd` query (s, b, heads, d), key and value (s, b, groups, d); `thd` (tokens, heads, d) with `cu_seqlens`.
Output (s, b, heads * d) or (tokens, heads * d). A packed batch is computed document by document, so one document's
values cannot reach another's. Query, key, value, output and log-sum-exp are kept for backward, as flash attention does
on GPUs. Under context parallelism the inputs are a rank's share of the pack (`nano3.context_parallel`), and
`cu_seqlens` those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from nano3.cpu.te.base import TransformerEngineBaseModule, refuse
from nano3.cpu.te.causal import CausalAttention
from nano3.cpu.te.context import Share


def _forgive_missing_state(_module: torch.nn.Module, incompatible_keys: Any) -> None:
    """Megatron-Core saves no `_extra_state` of the attention kernel, and Transformer Engine does not ask for it."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if "core_attention._extra_state" not in key]


class DotProductAttention(TransformerEngineBaseModule):
    """Signature of transformer_engine.pytorch.DotProductAttention 2.10, as far as Megatron-Core uses it."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        del cp_global_ranks, cp_stream, sequence_parallel  # streams and ranks of a CP group; nothing here uses them
        refuse(
            "DotProductAttention",
            attention_dropout=attention_dropout > 0.0,
            cross_attention=attention_type != "self",
            hierarchical_context_parallel=isinstance(cp_group, list),
            packed_context_parallel_by_all_gather=cp_group is not None and cp_comm_type == "all_gather",
            separate_value_width=isinstance(kv_channels, tuple) and kv_channels[0] != kv_channels[1],
        )
        self.num_attention_heads, self.num_gqa_groups = num_attention_heads, num_gqa_groups or num_attention_heads
        self.qkv_format, self.attn_mask_type, self.layer_number = qkv_format, attn_mask_type, layer_number
        self.tp_size, self.tp_group, self.get_rng_state_tracker = tp_size, tp_group, get_rng_state_tracker
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type
        width = kv_channels[0] if isinstance(kv_channels, tuple) else kv_channels
        self.register_load_state_dict_post_hook(_forgive_missing_state)
        self.softmax_scale = softmax_scale if softmax_scale is not None else width**-0.5

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        del max_seqlen_q, max_seqlen_kv  # choose a kernel's tile sizes
        layout, mask = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        if attention_mask is not None or mask not in ("causal", "padding_causal"):
            raise NotImplementedError(f"attention mask {mask!r}: this model's layers are causal")
        if layout == "sbhd":
            refuse("DotProductAttention", context_parallel_of_unpacked_sequences=self._shared)
            return self._causal(query_layer, key_layer, value_layer)
        if layout != "thd":
            raise NotImplementedError(f"qkv_format {layout!r}: Megatron-Core sends sbhd or thd")
        q_bounds = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
        kv_bounds = cu_seqlens_kv if cu_seqlens_kv_padded is None else cu_seqlens_kv_padded
        if q_bounds is None or kv_bounds is None or not torch.equal(q_bounds, kv_bounds):
            raise ValueError("packed self-attention needs equal cu_seqlens for queries and keys")
        if self._shared:
            if cu_seqlens_q_padded is None or cu_seqlens_kv_padded is None:
                raise ValueError("packed attention under context parallelism needs cu_seqlens_padded, as on GPUs")
            return self._context_parallel(q_bounds, query_layer, key_layer, value_layer)
        bounds = q_bounds.tolist()
        if bounds[0] != 0 or bounds[-1] != query_layer.shape[0]:
            raise ValueError(
                f"cu_seqlens run from {bounds[0]} to {bounds[-1]}, the pack has {query_layer.shape[0]} tokens"
            )
        outputs = [
            self._causal(*(t[start:end].unsqueeze(1) for t in (query_layer, key_layer, value_layer))).squeeze(1)
            for start, end in pairwise(bounds)
            if end > start
        ]
        return torch.cat(outputs)

    @property
    def _shared(self) -> bool:
        return self.cp_group is not None and self.cp_group.size() > 1

    def _context_parallel(
        self, bounds: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """A rank's share (t, heads, d) -> (t, heads * d)."""
        share = Share(bounds, self.cp_group)
        query, keys, values = (t.unsqueeze(1) for t in (query, share.whole(key), share.whole(value)))
        outputs = [
            self._attend(query[piece.queries], keys[piece.keys], values[piece.keys], piece.mask)
            for piece in share.pieces()
        ]
        return torch.cat(outputs).squeeze(1)

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(s, b, heads, d) -> (s, b, heads * d)."""
        return self._attend(query, key, value, None)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(s, b, heads, d) -> (s, b, heads * d); without a mask, causal."""
        if mask is None and query.device.type == "cpu":
            return CausalAttention.apply(query, key, value, self.softmax_scale).flatten(2)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)
