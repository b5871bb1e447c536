"""What one rank keeps between the forward and the backward pass of a micro batch, in bytes, by layer.

Imports neither torch nor NeMo. Closed formulas over the tensors that the GPU kernels save: Transformer Engine 2.10 (a
frozen linear layer saves nothing; its input stays only where an adapter, a router or a trained weight wants it),
mamba-ssm 2.3, flash attention (q, k, v, output and one FP32 number per row and head), megatron-core 0.16.1's MoE layer
and cross entropy. docs/memory.md derives each line and lists where the CPU stand-ins differ.
tests/launch/test_memory_plan.py compares with what autograd saves on CPU ranks.

T: tokens of a micro batch on this rank, s / cp; L: those outside matrices under sequence parallelism, T / tp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from launch.plan.layout import Layout
from launch.plan.weights import FP32, Adapters, linears, stage_layers
from nano3.arch import Arch, padded_vocab_size
from nano3.targets import EMBEDDING, OUTPUT

INT64 = 8


@dataclass(frozen=True)
class Batch:
    """A micro batch and how it is trained."""

    seq_length: int
    adapters: Adapters | None
    """None: every weight is trained."""
    value: int = 2
    """Bytes of an activation."""
    micro_batch: int = 1
    imbalance: float = 1.0
    """Tokens that come to this rank's experts over an even share, on average over its layers."""
    recompute: tuple[str, ...] = ()
    """As the setting train.recompute."""
    loss_chunk: int = 0
    """As the setting train.loss_chunk."""
    fused_permute: bool = True
    """Transformer Engine's permutation of tokens (GPUs), which keeps a map; without it PyTorch keeps masks."""


@dataclass(frozen=True)
class Stage:
    """Kept bytes of a pipeline stage for one micro batch."""

    layers: tuple[tuple[str, int], ...]
    """(letter, bytes) of every layer, recomputation considered."""
    without_recompute: tuple[int, ...]
    """Bytes of every layer if nothing were computed again: what a recomputed layer has while it is."""
    head: int
    """Final norm, what an adapter of the output layer keeps, and the gradient that a loss in chunks has made."""
    logits: int
    """FP32 probabilities over this rank's vocabulary; none where the loss is in chunks."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(kept for _, kept in self.layers) + self.head + self.logits


class _Rank:
    """Formulas of one rank in one layout."""

    def __init__(self, arch: Arch, layout: Layout, batch: Batch) -> None:
        self.arch, self.layout, self.batch, self.value = arch, layout, batch, batch.value
        self.tokens = batch.micro_batch * batch.seq_length // layout.cp
        self.local = self.tokens // layout.tp if layout.sequence_parallel else self.tokens
        self.dispatched = round(self.local * arch.num_experts_per_tok * layout.etp * batch.imbalance)
        self.hidden = self.local * arch.hidden_size * self.value
        self.scattered = arch.hidden_size * self.local // self.tokens
        """Outputs per token of a row-parallel layer: its tokens are shared out afterwards, its width is not."""

    def trained(self, path: str) -> bool:
        """Whether something learns at this layer, so that its input must stay."""
        return self.batch.adapters is None or path in self.batch.adapters.ranks

    def adapter(self, path: str, tokens: int, inputs: int, outputs: int, kept: bool = False) -> int:
        """What learning at `path` keeps: the input (unless it is `kept` anyway), A's output and, for DoRA, the layer's.

        `tokens` are those that A sees: gathered along the sequence for a column-parallel layer.
        """
        adapters, size = self.batch.adapters, tokens * inputs * self.value
        if adapters is None:
            return 0 if kept else size
        if path not in adapters.ranks:
            return 0
        total = tokens * adapters.ranks[path] * self.value
        if adapters.dropout:
            total += size + tokens * inputs  # the dropped input and a byte of mask for each value
        elif not kept:
            total += size
        return total + (tokens * outputs * self.value if adapters.dora else 0)

    def norm(self) -> int:
        """RMSNorm before a layer: its input, which is the residual, and a number per token."""
        return self.hidden + self.local * FP32

    def entering(self) -> int:
        """Tokens whose input a column-parallel layer keeps: an adapter's is gathered, a trained weight's is not."""
        return self.local if self.batch.adapters is None else self.tokens

    def mamba(self, number: int) -> int:
        """in_proj, convolution and scan (inputs, output before the gate, document numbers), gated norm, out_proj."""
        arch, tp, t = self.arch, self.layout.tp, self.tokens
        into, out = linears(arch, self.layout, number, "M")
        inner, rows = arch.mamba_inner_size // tp, sum(size for _, size in arch.mamba_sections) // tp
        kept = self.norm() + self.adapter(into.path, self.entering(), arch.hidden_size, rows)
        kept += t * (rows + 2 * inner) * self.value + t * FP32  # z x B C dt, scan's output, gated; int32 numbers
        kept += t * arch.n_groups // tp * FP32  # one number per token and group
        return kept + self.adapter(out.path, t, inner, self.scattered)

    def attention(self, number: int) -> int:
        """q, k, v as projected, q again where several groups are taken apart, output, log-sum-exp."""
        arch, tp, t = self.arch, self.layout.tp, self.tokens
        into, out = linears(arch, self.layout, number, "*")
        heads, kv = arch.num_attention_heads // tp, max(1, arch.num_key_value_heads // tp)
        copies = 2 if kv > 1 else 1  # with one group of heads the projection is q as it stands
        kept = self.norm() + self.adapter(into.path, self.entering(), arch.hidden_size, into.outputs)
        kept += t * ((1 + copies) * heads + 2 * kv) * arch.head_dim * self.value + t * heads * FP32
        return kept + self.adapter(out.path, t, heads * arch.head_dim, self.scattered, kept=True)

    def feed_forward(self, number: int) -> int:
        """A dense MLP: relu(x) and its square."""
        into, out = linears(self.arch, self.layout, number, "-")
        kept = self.norm() + self.adapter(into.path, self.entering(), into.inputs, into.outputs)
        kept += self.tokens * into.outputs * self.value
        return kept + self.adapter(out.path, self.tokens, out.inputs, self.scattered)

    def moe(self, number: int, recompute: tuple[str, ...]) -> int:
        """Norm and its output (the router keeps it), router, shared experts, routed experts."""
        kept = self.norm() + (0 if "layernorm" in recompute else self.hidden)
        if "moe" in recompute:
            return kept
        shared = 0 if "shared_experts" in recompute else self.shared_experts(number)
        return kept + shared + self.router() + self.routed_experts(number, "moe_act" in recompute)

    def router(self) -> int:
        """FP32 scores, the chosen ones with their numbers, and how tokens were permuted."""
        experts, top = self.arch.n_routed_experts, self.arch.num_experts_per_tok
        kept = self.local * ((experts + top + 1) * FP32 + top * INT64)
        if self.batch.fused_permute:
            return kept + self.local * (2 * experts + 1) * FP32 + 2 * self.dispatched * FP32
        return kept + self.local * experts * (FP32 + 1) + self.dispatched * INT64

    def shared_experts(self, number: int) -> int:
        """relu(x) and its square; fc1's input is the norm's output, gathered for an adapter."""
        _, _, into, out = linears(self.arch, self.layout, number, "E")
        same = self.entering() == self.local
        kept = self.adapter(into.path, self.entering(), into.inputs, into.outputs, kept=same)
        kept += self.tokens * into.outputs * self.value
        return kept + self.adapter(out.path, self.tokens, out.inputs, self.scattered)

    def routed_experts(self, number: int, recompute_activation: bool) -> int:
        """x before the activation, the token's weight (their fused kernel keeps no more), and the product."""
        into, out, _, _ = linears(self.arch, self.layout, number, "E")
        kept = self.adapter(into.path, self.dispatched, into.inputs, into.outputs)
        kept += self.dispatched * (into.outputs * self.value + FP32)
        return kept + self.adapter(out.path, self.dispatched, out.inputs, out.outputs, kept=recompute_activation)

    def layer(self, number: int, letter: str, recompute: tuple[str, ...]) -> int:
        """Bytes that a layer keeps."""
        if "full" in recompute or ("mamba" in recompute and letter == "M"):
            return self.hidden
        if letter == "E":
            return self.moe(number, recompute)
        return {"M": self.mamba, "*": self.attention, "-": self.feed_forward}[letter](number)

    def head(self) -> int:
        """Final norm, and the output layer's input or its gradient where one stays."""
        adapters = self.batch.adapters
        kept = self.norm() + (self.hidden if self.batch.loss_chunk else 0)
        if adapters is None or OUTPUT in adapters.ranks:
            kept += self.adapter(OUTPUT, self.entering(), self.arch.hidden_size, self.vocabulary())
        return kept

    def vocabulary(self) -> int:
        """Rows of it on this rank."""
        return padded_vocab_size(self.arch.vocab_size, self.layout.tp) // self.layout.tp

    def logits(self, tokens: int) -> int:
        """FP32 probabilities of this rank's vocabulary, the labels and whether they are in it."""
        return tokens * (self.vocabulary() * FP32 + INT64 + 1)


def kept(arch: Arch, layout: Layout, stage: int, batch: Batch) -> Stage:
    """What a rank of pipeline stage `stage` keeps of one micro batch."""
    rank, last = _Rank(arch, layout, batch), stage == layout.pp - 1
    numbered = stage_layers(arch, layout, stage)
    layers = [(letter, rank.layer(number, letter, batch.recompute)) for number, letter in numbered]
    if stage == 0 and not batch.recompute:
        layers = _without_frozen_beginning(rank, numbered, layers)
    return Stage(
        layers=tuple(layers),
        without_recompute=tuple(rank.layer(number, letter, ()) for number, letter in numbered),
        head=rank.head() if last else 0,
        logits=rank.logits(rank.tokens) if last and not batch.loss_chunk else 0,
    )


def in_loss(arch: Arch, layout: Layout, batch: Batch) -> int:
    """Bytes of the last stage while its loss is computed: probabilities, beside them logits or their gradient, and,
    where the loss is in chunks, the gathered hidden states and their gradient under tensor parallelism."""
    rank = _Rank(arch, layout, batch)
    tokens = min(batch.loss_chunk or rank.tokens, rank.tokens)
    gathered = 2 * rank.tokens * arch.hidden_size * batch.value if batch.loss_chunk and layout.tp > 1 else 0
    return rank.logits(tokens) + tokens * rank.vocabulary() * batch.value + gathered


def _without_frozen_beginning(
    rank: _Rank, numbered: tuple[tuple[int, str], ...], layers: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Nothing before the first adapter has a backward pass, nor has the norm of its layer. (Recomputation gives the
    embedding's output a gradient, and then all of it has.)"""
    if rank.batch.adapters is None or rank.trained(EMBEDDING):
        return layers
    paths = [[linear.path for linear in linears(rank.arch, rank.layout, *layer)] for layer in numbered]
    first = next((place for place, names in enumerate(paths) if any(map(rank.trained, names))), len(layers))
    cut = [(letter, 0) for letter, _ in layers[:first]]
    return cut + [(letter, size - rank.norm()) for letter, size in layers[first : first + 1]] + layers[first + 1 :]


def by_letter(layers: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes by kind of layer."""
    total: dict[str, int] = {}
    for letter, kept_bytes in layers:
        total[letter] = total.get(letter, 0) + kept_bytes
    return total


def transients(arch: Arch, layout: Layout, batch: Batch) -> Iterator[tuple[str, int]]:
    """(letter, bytes) that the backward pass of a layer needs beside what is kept.

    Gradients of the largest tensors, and for Mamba what its kernel computes again: convolution, FP32 states of the
    chunks and their gradients.
    """
    rank = _Rank(arch, layout, batch)
    value, tp, t = batch.value, layout.tp, rank.tokens
    inner, rows = arch.mamba_inner_size // tp, sum(size for _, size in arch.mamba_sections) // tp
    channels = sum(size for _, size in arch.conv_sections) // tp
    states = t * inner * arch.ssm_state_size * FP32 // arch.chunk_size
    yield "M", t * (rows + 2 * inner + 2 * channels) * value + 2 * states
    heads = arch.num_attention_heads // tp
    yield "*", t * (5 * heads * arch.head_dim + arch.hidden_size) * value
    width = arch.moe_intermediate_size // layout.etp
    moe = rank.dispatched * (3 * arch.hidden_size + 2 * width) * value
    yield "E", moe + t * 2 * arch.moe_shared_expert_intermediate_size // tp * value
    yield "-", t * (2 * arch.intermediate_size // tp + arch.hidden_size) * value
