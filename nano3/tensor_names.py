"""Where the rows of every Hugging Face tensor sit in Megatron-Core's tensors. Torch-free; the one owner of this map.

A Megatron tensor is a stack of row blocks of Hugging Face tensors: `linear_qkv` interleaves q, k and v by KV group, a
grouped expert tensor (experts, out, in) stacks the experts, `in_proj` is cut into sections that reshard under tensor
parallelism. Writing that down as row blocks once serves both directions of the conversion and the merge of adapters,
whose delta of a module has the rows of that module's weight.

Keys are those of megatron-core 0.16.1's stock `mamba_stack_spec`, without the prefix `module.`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from nano3 import targets
from nano3.arch import Arch

EMBEDDING = f"{targets.EMBEDDING}.weight"
OUTPUT = f"{targets.OUTPUT}.weight"
VOCABULARY_KEYS = (EMBEDDING, OUTPUT)
"""Megatron tensors that may have more rows than the vocabulary."""

Sections = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class RowBlock:
    """Rows `start` to `start + count` of the Hugging Face tensor `name` (axis 0)."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class MegatronTensor:
    """One tensor of a Megatron checkpoint: its global shape, and the row blocks that make it, from top to bottom.

    An expert tensor has shape (experts, out, in); its rows are counted as if it were (experts * out, in).
    """

    key: str
    shape: tuple[int, ...]
    blocks: tuple[RowBlock, ...]
    experts: bool = False

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.shape[2:] if self.experts else self.shape[1:]

    def box(self, first: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(offset, size) in the tensor of `count` rows from row `first` on; of an expert tensor within one expert."""
        rest = (0,) * len(self.row_shape)
        if not self.experts:
            return (first, *rest), (count, *self.row_shape)
        expert, row = divmod(first, self.shape[1])
        assert row + count <= self.shape[1], (self.key, first, count)
        return (expert, row, *rest), (1, count, *self.row_shape)

    def rows(self, first: int, count: int) -> Iterator[RowBlock]:
        """Rows `first` to `first + count` as Hugging Face's, from top to bottom."""
        begin = 0
        for block in self.blocks:
            low, high = max(first, begin), min(first + count, begin + block.count)
            if low < high:
                yield RowBlock(block.name, block.start + low - begin, high - low)
            begin += block.count


@dataclass(frozen=True)
class Linear:
    """A linear module of one layer, or the embedding or output layer: what LoRA can target.

    `module` is its path in Megatron's layer (of the embedding and output layer the whole path). `blocks` are the rows
    of its weight in Megatron's order, of all experts one after the other when `experts` is not 0. `norm` is the
    Hugging Face norm that Megatron fuses into the module.
    """

    module: str
    blocks: tuple[RowBlock, ...]
    width: int
    sections: Sections = ()
    norm: str | None = None
    experts: int = 0

    @property
    def rows(self) -> int:
        """Output width of the module (of one expert)."""
        return sum(block.count for block in self.blocks) // (self.experts or 1)

    @property
    def module_key(self) -> str:
        """What megatron-core calls the module in checkpoints: grouped experts are stored as if each were a module."""
        return self.module.replace("mlp.experts.", "mlp.experts.experts.")

    @property
    def weight_key(self) -> str:
        return self.module_key + ".weight"


def linears(arch: Arch, number: int) -> tuple[Linear, ...]:
    """The linear modules of layer `number`."""
    layer = f"backbone.layers.{number}."
    specs = _Rows(arch, layer + "mixer.")
    letter = arch.layers[number]
    if letter == "M":
        return (
            specs.linear("mixer.in_proj", "in_proj.weight", arch.mamba_sections, norm=layer + "norm.weight"),
            specs.linear("mixer.out_proj", "out_proj.weight"),
        )
    if letter == "*":
        return (
            Linear("self_attention.linear_qkv", specs.grouped_qkv(), arch.hidden_size, norm=layer + "norm.weight"),
            specs.linear("self_attention.linear_proj", "o_proj.weight"),
        )
    if letter == "E":
        return (
            *specs.feed_forward("mlp.shared_experts.", "shared_experts."),
            specs.experts("mlp.experts.linear_fc1", "up_proj"),
            specs.experts("mlp.experts.linear_fc2", "down_proj"),
        )
    return specs.feed_forward("mlp.", "", norm=layer + "norm.weight")


def linear_tensors(arch: Arch) -> frozenset[str]:
    """The Hugging Face tensors of all linear layers: what QLoRA freezes in 4 bits."""
    found = (linear for number in range(len(arch.layers)) for linear in linears(arch, number))
    return frozenset(block.name for linear in found for block in linear.blocks)


def adaptable(arch: Arch) -> dict[str, Linear]:
    """What can carry an adapter by its path, as `nano3.targets.adaptable_modules` lists them."""
    names = {targets.EMBEDDING: "backbone.embeddings.weight", targets.OUTPUT: "lm_head.weight"}
    result = {
        path: Linear(path, (RowBlock(name, 0, arch.vocab_size),), arch.hidden_size) for path, name in names.items()
    }
    for number in range(len(arch.layers)):
        result |= {f"decoder.layers.{number}.{linear.module}": linear for linear in linears(arch, number)}
    return result


def adapter_shapes(linear: Linear, rank: int, each: bool, dora: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of one adapter behind `.adapter.`, A first, with their global shapes (padded vocabulary rows aside).

    `each`: routed experts have one adapter each, A (experts, rank, in) and B (experts, out, rank). DoRA magnitudes of
    routed experts are (experts, out) either way.
    """
    experts = (linear.experts,) if linear.experts else ()
    own = experts if each else ()
    shapes: dict[str, tuple[int, ...]] = {"linear_in.weight": (*own, rank, linear.width)}
    rows = {f".{name}": count for name, count in linear.sections} or {"": linear.rows}
    shapes |= {f"linear_out.weight{part}": (*own, count, rank) for part, count in rows.items()}
    if dora:
        shapes |= {f"magnitude{part}": (*experts, count) for part, count in rows.items()}
    return shapes


def adapter_key(path: str, linear: Linear, name: str) -> str:
    """The key of one of `adapter_shapes` in an adapter's checkpoint; `path` is the module's in `adaptable`."""
    return f"module.{path.removesuffix(linear.module)}{linear.module_key}.adapter.{name}"


def megatron_tensors(arch: Arch) -> Iterator[MegatronTensor]:
    """Every tensor of the Megatron checkpoint without vocabulary padding, layer after layer."""
    whole = partial(_whole, arch)
    yield whole(EMBEDDING, "backbone.embeddings.weight")
    for number, letter in enumerate(arch.layers):
        prefix, layer = f"decoder.layers.{number}.", f"backbone.layers.{number}."
        for linear in linears(arch, number):
            yield from _weights(prefix, linear)
            if linear.norm:
                yield whole(f"{prefix}{linear.module}.layer_norm_weight", linear.norm)
        if letter == "M":
            for name in ("A_log", "D", "dt_bias", "norm.weight"):
                yield whole(f"{prefix}mixer.{name}", f"{layer}mixer.{name}")
            for name in ("weight", "bias"):
                yield from _cut(
                    whole(f"{prefix}mixer.conv1d.{name}", f"{layer}mixer.conv1d.{name}"), arch.conv_sections
                )
        if letter == "E":
            yield whole(f"{prefix}pre_mlp_layernorm.weight", f"{layer}norm.weight")
            yield whole(f"{prefix}mlp.router.weight", f"{layer}mixer.gate.weight")
            yield whole(f"{prefix}mlp.router.expert_bias", f"{layer}mixer.gate.e_score_correction_bias")
    yield whole("decoder.final_norm.weight", "backbone.norm_f.weight")
    yield whole(OUTPUT, "lm_head.weight")


def carried_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[MegatronTensor]:
    """Tensors of a Hugging Face checkpoint that are no part of the model in Megatron, under their own names."""
    for name, shape in shapes.items():
        yield MegatronTensor(name, shape, (RowBlock(name, 0, shape[0]),))


def extra_state_keys(arch: Arch) -> dict[str, int]:
    """Keys of the `_extra_state` objects that a load asks for -> number of shards.

    Transformer Engine's modules have one each (grouped linears one per expert, shard by shard), and so has
    megatron-core's own output layer.
    """
    keys: dict[str, int] = {}
    for number, letter in enumerate(arch.layers):
        prefix = f"decoder.layers.{number}."
        for linear in linears(arch, number):
            keys[f"{prefix}{linear.module_key}._extra_state"] = linear.experts or 1
        if letter == "E":
            keys[f"{prefix}pre_mlp_layernorm._extra_state"] = 1
    return keys | {"decoder.final_norm._extra_state": 1, "output_layer._extra_state": 1}


class _Rows:
    """Builds the linear modules of a layer; `prefix` is `backbone.layers.N.mixer.`."""

    def __init__(self, arch: Arch, prefix: str) -> None:
        self.arch, self.prefix, self.specs = arch, prefix, arch.tensors()

    def linear(self, module: str, name: str, sections: Sections = (), norm: str | None = None) -> Linear:
        rows, width = self.specs[self.prefix + name].shape
        return Linear(module, (RowBlock(self.prefix + name, 0, rows),), width, sections, norm)

    def feed_forward(self, module: str, name: str, norm: str | None = None) -> tuple[Linear, Linear]:
        return (
            self.linear(module + "linear_fc1", name + "up_proj.weight", norm=norm),
            self.linear(module + "linear_fc2", name + "down_proj.weight"),
        )

    def experts(self, module: str, name: str) -> Linear:
        names = [f"{self.prefix}experts.{k}.{name}.weight" for k in range(self.arch.n_routed_experts)]
        rows, width = self.specs[names[0]].shape
        return Linear(module, tuple(RowBlock(n, 0, rows) for n in names), width, experts=len(names))

    def grouped_qkv(self) -> tuple[RowBlock, ...]:
        """Rows of linear_qkv: for each KV group its query heads, its key head, its value head."""
        queries = self.arch.num_attention_heads // self.arch.num_key_value_heads * self.arch.head_dim
        blocks = []
        for group in range(self.arch.num_key_value_heads):
            for name, rows in (("q", queries), ("k", self.arch.head_dim), ("v", self.arch.head_dim)):
                blocks.append(RowBlock(f"{self.prefix}{name}_proj.weight", group * rows, rows))
        return tuple(blocks)


def _whole(arch: Arch, key: str, name: str) -> MegatronTensor:
    shape = arch.tensors()[name].shape
    return MegatronTensor(key, shape, (RowBlock(name, 0, shape[0]),))


def _weights(prefix: str, linear: Linear) -> Iterator[MegatronTensor]:
    shape = (linear.experts, linear.rows, linear.width) if linear.experts else (linear.rows, linear.width)
    tensor = MegatronTensor(prefix + linear.weight_key, shape, linear.blocks, bool(linear.experts))
    yield from _cut(tensor, linear.sections) if linear.sections else (tensor,)


def _cut(tensor: MegatronTensor, sections: Sections) -> Iterator[MegatronTensor]:
    """Cuts a tensor of one block into its sections, keys `KEY.z`, `KEY.x`, ..."""
    (block,) = tensor.blocks
    start = block.start
    for section, rows in sections:
        yield MegatronTensor(f"{tensor.key}.{section}", (rows, *tensor.shape[1:]), (RowBlock(block.name, start, rows),))
        start += rows
