"""The map of tensor names, and the order of rows, against Megatron-Bridge's own (tests/helpers/foreign.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nano3.arch import PRESETS, Arch
from nano3.tensor_names import MegatronTensor, megatron_tensors
from tests.helpers.foreign import take

BRIDGE = "megatron/bridge/models"
KINDS = ("AutoMapping", "ColumnParallelMapping", "RowParallelMapping", "MambaInProjMapping", "MambaConv1dMapping")
NANO = Arch.load(PRESETS["nano"])
pytestmark = pytest.mark.full


def table() -> list[tuple[re.Pattern[str], list[str]]]:
    """Megatron-Bridge's mapping of nemotron_h: a pattern of Megatron's name, its Hugging Face names with `*`."""
    found: list[tuple[re.Pattern[str], list[str]]] = []

    def record(megatron_param: str, hf_param: str | None = None, **shards: str) -> None:
        pattern = re.compile(re.escape(megatron_param).replace(r"\*", r"(\d+)"))
        found.append((pattern, [hf_param] if hf_param else list(shards.values())))

    bridge = take(
        f"{BRIDGE}/nemotronh/nemotron_h_bridge.py",
        {"NemotronHBridge": ("mapping_registry", "_hf_mtp_config")},
        **dict.fromkeys((*KINDS, "QKVMapping"), record),
        MegatronMappingRegistry=lambda *_: None,
    )["NemotronHBridge"]()
    bridge.hf_config = SimpleNamespace(num_nextn_predict_layers=0)
    bridge.mapping_registry()
    return found


def theirs(known: list[tuple[re.Pattern[str], list[str]]], key: str) -> set[str]:
    """Hugging Face names of the first pattern that matches a Megatron name, as Megatron-Bridge looks it up."""
    for pattern, names in known:
        if match := pattern.fullmatch(key):
            return {name.replace("*", "{}").format(*match.groups()) for name in names}
    return set()


def single(tensor: MegatronTensor) -> Iterator[tuple[str, set[str]]]:
    """Names of Megatron's parameters that a tensor of our map stands for, each with its Hugging Face names.

    Grouped experts are stored as one tensor and are parameters weight0, weight1, ...; a section is a part of one.
    """
    if tensor.experts:
        for number, block in enumerate(tensor.blocks):
            yield tensor.key.replace("experts.experts.", "experts.") + str(number), {block.name}
    else:
        yield re.sub(r"\.(z|x|B|C|dt)$", "", tensor.key), {block.name for block in tensor.blocks}


def compared(arch: Arch, edit: Callable[[MegatronTensor], MegatronTensor] = lambda t: t) -> tuple[int, list[str]]:
    """How many names were compared, and those for which the two maps differ."""
    known, names = table(), [pair for tensor in megatron_tensors(arch) for pair in single(edit(tensor))]
    return len(names), [key for key, ours in names if theirs(known, key) != ours]


def test_every_name_is_megatron_bridges():
    """Experts one by one and sections of in_proj and conv1d by themselves; q, k and v together."""
    assert compared(NANO) == (6415, [])
    mapped = {name for tensor in megatron_tensors(NANO) for _, names in single(tensor) for name in names}
    assert mapped == set(NANO.tensors())
    assert len(mapped) == 6243


def test_two_experts_swapped_are_seen():
    def swap(tensor: MegatronTensor) -> MegatronTensor:
        if tensor.key != "decoder.layers.1.mlp.experts.experts.linear_fc1.weight":
            return tensor
        first, second, *rest = tensor.blocks
        return MegatronTensor(tensor.key, tensor.shape, (second, first, *rest), True)

    key = "decoder.layers.1.mlp.experts.linear_fc1.weight"
    assert compared(NANO, swap) == (6415, [f"{key}0", f"{key}1"])


def rows(name: str, count: int) -> torch.Tensor:
    """A tensor (count, 1) that says of every row whose it is: a thousand thousands for each name, then its number."""
    place = sorted(NANO.tensors()).index(name)
    return torch.arange(count)[:, None].double() + 1e6 * place


def ours(tensors: list[MegatronTensor], ranks: int) -> torch.Tensor:
    """The same rows as Megatron's tensor-parallel ranks hold them, one rank after the other: a part of each section."""
    parts = []
    for rank in range(ranks):
        for tensor in tensors:
            whole = torch.cat([rows(b.name, b.start + b.count)[b.start :] for b in tensor.blocks])
            parts.append(whole.chunk(ranks)[rank])
    return torch.cat(parts)


def parallel(mapping: Any, name: str, config: Any) -> torch.Tensor:
    """What a mapping of Megatron-Bridge makes of a Hugging Face tensor for two tensor-parallel ranks."""
    mapping.tp_rank, mapping.tp_size, mapping.megatron_param = 0, 2, name
    mapping._get_config = lambda _: config
    mapping._tp_mapping = SimpleNamespace(hf_to_megatron=lambda merged, _: merged)
    whole = rows(name, NANO.tensors()[name].shape[0])
    return mapping.hf_to_megatron(whole if "in_proj" in name else whole[..., None], None).view(-1, 1)


def test_the_order_of_rows_is_megatron_bridges():
    config = SimpleNamespace(
        num_attention_heads=NANO.num_attention_heads,
        num_query_groups=NANO.num_key_value_heads,
        kv_channels=NANO.head_dim,
        hidden_size=1,
        mamba_num_heads=NANO.mamba_num_heads,
        mamba_head_dim=NANO.mamba_head_dim,
        mamba_state_dim=NANO.ssm_state_size,
        mamba_num_groups=NANO.n_groups,
    )
    found = take(
        f"{BRIDGE}/conversion/param_mapping.py",
        {
            "merge_qkv_weights": (),
            "MambaInProjMapping": ("hf_to_megatron",),
            "ChunkedMapping": ("hf_to_megatron",),
            "MambaConv1dMapping": ("get_shard_idx",),
        },
        torch=torch,
    )
    tensors = list(megatron_tensors(NANO))
    names = [f"backbone.layers.5.mixer.{part}_proj.weight" for part in "qkv"]
    merged = found["merge_qkv_weights"](config, *(rows(name, NANO.tensors()[name].shape[0]) for name in names))
    assert torch.equal(
        merged, ours([t for t in tensors if t.key == "decoder.layers.5.self_attention.linear_qkv.weight"], 1)
    )
    for kind, name in (("MambaInProjMapping", "in_proj.weight"), ("MambaConv1dMapping", "conv1d.weight")):
        sections = [t for t in tensors if t.key.startswith(f"decoder.layers.0.mixer.{name}.")]
        theirs = parallel(found[kind](), f"backbone.layers.0.mixer.{name}", config)
        assert torch.equal(theirs, ours(sections, 2)), name
