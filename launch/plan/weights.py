"""What one rank holds of the model and of its adapters: every tensor of it, from the architecture and the layout alone.

Imports neither torch nor NeMo. The shapes are those of megatron-core 0.16.1's `MambaModel` on its stock spec and of the
adapters in `nano3.lora`; tests/launch/test_memory_plan.py compares them, byte for byte, with builds on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from launch.plan.layout import Layout, stages
from launch.plan.nf4_weights import nf4_bytes
from nano3.arch import Arch, padded_vocab_size
from nano3.targets import EMBEDDING, OUTPUT, is_routed

FP32 = 4


@dataclass(frozen=True)
class Held:
    """One tensor of one rank, or several of one size."""

    name: str
    """Path of its module, with the global layer number."""
    count: int
    """Values of one tensor."""
    size: int
    """Bytes of a value."""
    per_expert: bool = False
    """Of routed experts: gradient and optimizer state are shared out over the expert data-parallel ranks."""
    buffer: bool = False
    """Not trained, whatever is."""
    tensors: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.count * self.size * self.tensors


@dataclass(frozen=True)
class Linear:
    """One linear layer as one rank has it."""

    path: str
    inputs: int
    outputs: int
    row: bool
    """Row-parallel: inputs are this rank's share; otherwise outputs are."""
    experts: int = 1
    """Local routed experts, which have a matrix each."""


def stage_layers(arch: Arch, layout: Layout, stage: int) -> tuple[tuple[int, str], ...]:
    """(global number, letter) of the layers of a pipeline stage."""
    return _numbered(arch, layout.pp)[stage]


@lru_cache(maxsize=64)
def _numbered(arch: Arch, pp: int) -> tuple[tuple[tuple[int, str], ...], ...]:
    """Layers of every stage; kept, because a search asks for the same cuts over and over."""
    numbers = iter(range(len(arch.pattern)))
    return tuple(tuple((next(numbers), letter) for letter in part) for part in stages(arch, pp))


def linears(arch: Arch, layout: Layout, number: int, letter: str) -> Iterator[Linear]:
    """The linear layers of a layer that can carry an adapter, local widths."""
    hidden, tp, layer = arch.hidden_size, layout.tp, f"decoder.layers.{number}."
    if letter == "M":
        yield Linear(f"{layer}mixer.in_proj", hidden, sum(rows for _, rows in arch.mamba_sections) // tp, False)
        yield Linear(f"{layer}mixer.out_proj", arch.mamba_inner_size // tp, hidden, True)
    elif letter == "*":
        rows = (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
        yield Linear(f"{layer}self_attention.linear_qkv", hidden, rows // tp, False)
        yield Linear(f"{layer}self_attention.linear_proj", arch.num_attention_heads * arch.head_dim // tp, hidden, True)
    elif letter == "E":
        local, width = arch.n_routed_experts // layout.ep, arch.moe_intermediate_size // layout.etp
        yield Linear(f"{layer}mlp.experts.linear_fc1", hidden, width, False, local)
        yield Linear(f"{layer}mlp.experts.linear_fc2", width, hidden, True, local)
        yield from _feed_forward(f"{layer}mlp.shared_experts.", hidden, arch.moe_shared_expert_intermediate_size // tp)
    else:
        yield from _feed_forward(f"{layer}mlp.", hidden, arch.intermediate_size // tp)


def _feed_forward(prefix: str, hidden: int, width: int) -> Iterator[Linear]:
    yield Linear(f"{prefix}linear_fc1", hidden, width, False)
    yield Linear(f"{prefix}linear_fc2", width, hidden, True)


def weights(arch: Arch, layout: Layout, stage: int, value: int, nf4: bool = False) -> Iterator[Held]:
    """Every parameter and buffer of the base model on a rank of pipeline stage `stage`; `value` bytes per value.

    `nf4`: the linear layers are in 4 bits, and their items count bytes.
    """
    vocabulary = padded_vocab_size(arch.vocab_size, layout.tp) // layout.tp * arch.hidden_size
    if stage == 0:
        yield Held(EMBEDDING, vocabulary, value)
    for number, letter in stage_layers(arch, layout, stage):
        if nf4:
            for path, (count, tensors) in nf4_bytes(arch, layout, number).items():
                yield Held(path, count, 1, per_expert=is_routed(path), buffer=True, tensors=tensors)
        for linear in () if nf4 else linears(arch, layout, number, letter):
            count, routed = linear.inputs * linear.outputs, is_routed(linear.path)
            yield Held(linear.path, count, value, per_expert=routed, tensors=linear.experts)
        yield Held(f"decoder.layers.{number}.norm", arch.hidden_size, value)
        yield from _others(arch, layout, f"decoder.layers.{number}.", letter, value)
    if stage == layout.pp - 1:
        yield Held("decoder.final_norm", arch.hidden_size, value)
        yield Held(OUTPUT, vocabulary, value)


def _others(arch: Arch, layout: Layout, layer: str, letter: str, value: int) -> Iterator[Held]:
    """What a layer holds beside linear layers and its norm. A_log, D and the router's buffers stay FP32."""
    if letter == "M":
        channels = sum(rows for _, rows in arch.conv_sections) // layout.tp
        heads = arch.mamba_num_heads // layout.tp
        yield Held(f"{layer}mixer.conv1d.weight", channels * arch.conv_kernel, value)
        yield Held(f"{layer}mixer.conv1d.bias", channels, value)
        yield Held(f"{layer}mixer.A_log and D", heads, FP32, tensors=2)
        yield Held(f"{layer}mixer.dt_bias", heads, value)
        yield Held(f"{layer}mixer.norm", arch.mamba_inner_size // layout.tp, value)
    elif letter == "E":
        yield Held(f"{layer}mlp.router.weight", arch.n_routed_experts * arch.hidden_size, value)
        yield Held(f"{layer}mlp.router bias and counts", arch.n_routed_experts, FP32, buffer=True, tensors=2)


@dataclass(frozen=True)
class Adapters:
    """What is trained beside a frozen base."""

    ranks: Mapping[str, int]
    """Rank of every adapted module, by path (`nano3.targets.sizes`)."""
    each_expert: bool = False
    """Routed experts have an adapter each instead of one for all of a layer."""
    dora: bool = False
    dropout: bool = False


def adapter_weights(arch: Arch, layout: Layout, stage: int, value: int, adapters: Adapters) -> Iterator[Held]:
    """Every adapter parameter of a rank of pipeline stage `stage`.

    Dense layers: A (rank, in) and B (out, rank), A split along the rank (column-parallel) or the input (row-parallel),
    B along the output. Routed experts: one for all, whole on every rank, or one for each local expert, of which the
    matrix is cut on whose side expert tensor parallelism cuts the expert. DoRA's magnitudes are FP32: a value for each
    output row of this rank, of all rows behind a row-parallel layer, of every local expert.
    """
    if stage == 0 and EMBEDDING in adapters.ranks:
        yield from _vocabulary(arch, layout, EMBEDDING, value, adapters)
    for number, letter in stage_layers(arch, layout, stage):
        for linear in linears(arch, layout, number, letter):
            if linear.path in adapters.ranks:
                yield from _adapter(linear, layout, value, adapters)
    if stage == layout.pp - 1 and OUTPUT in adapters.ranks:
        yield from _vocabulary(arch, layout, OUTPUT, value, adapters)


def _adapter(linear: Linear, layout: Layout, value: int, adapters: Adapters) -> Iterator[Held]:
    rank, tp = adapters.ranks[linear.path], layout.tp
    inputs, outputs, name = linear.inputs, linear.outputs, f"{linear.path}.adapter"
    if is_routed(linear.path):
        copies = linear.experts if adapters.each_expert else 1
        whole = 1 if adapters.each_expert else layout.etp  # a shared adapter is not sliced as its experts are
        low, high = rank * inputs * (whole if linear.row else 1), rank * outputs * (1 if linear.row else whole)
    else:
        copies = 1
        low, high = (rank * inputs, outputs // tp * rank) if linear.row else (rank // tp * inputs, outputs * rank)
    own = is_routed(linear.path) and adapters.each_expert
    yield Held(f"{name}.linear_in", low, value, per_expert=own, tensors=copies)
    yield Held(f"{name}.linear_out", high, value, per_expert=own, tensors=copies)
    if adapters.dora:
        yield Held(f"{name}.magnitude", linear.experts * outputs, FP32, per_expert=is_routed(linear.path))


def _vocabulary(arch: Arch, layout: Layout, path: str, value: int, adapters: Adapters) -> Iterator[Held]:
    rows, rank = padded_vocab_size(arch.vocab_size, layout.tp) // layout.tp, adapters.ranks[path]
    low = rank if path == EMBEDDING else rank // layout.tp
    yield Held(f"{path}.adapter.linear_in", low * arch.hidden_size, value)
    yield Held(f"{path}.adapter.linear_out", rows * rank, value)
    if adapters.dora:
        yield Held(f"{path}.adapter.magnitude", rows, FP32)
