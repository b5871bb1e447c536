"""The memory plan against megatron-core's own model: weights exactly, the rest as CPU ranks measure it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from launch.plan.activations import in_loss, kept
from launch.plan.hardware import GIB, HARDWARE
from launch.plan.layout import Layout
from launch.plan.memory import Workload, gradient_bytes, optimizer_bytes, parameter_bytes, plan_memory, trained_tensors
from launch.plan.weights import Adapters, adapter_weights, linears, stage_layers, weights
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError
from nano3.parity.case import ARCH, NF4_WIDTHS, PACK
from nano3.targets import PRESETS, VOCABULARY, select, sizes
from tests.helpers.memory_cases import DENSE_LAYOUTS, LAYOUTS, NF4_LAYOUTS, RUNS, VARIANT_LAYOUTS, VARIANTS
from tests.helpers.probes import made_afresh_by

NANO = Arch.load(resolve_model("nano"))


def layout_of(name: str) -> Layout:
    """From "tp2.ep8"; the data-parallel size is no part of a layout."""
    found = {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", name)}
    return Layout(**{axis: size for axis, size in found.items() if axis != "dp"})


def ranks_of(name: str) -> int:
    copies = re.search(r"dp(\d+)", name)
    return layout_of(name).smallest_world * int(copies.group(1) if copies else 1)


def adapters_of(arch: Arch, settings: dict[str, Any], rank: int = 32) -> Adapters:
    """The adapters that these arguments of the probe stand for."""
    experts = settings.get("experts", "shared")
    targets = [*PRESETS[settings.get("preset", "all")], *(VOCABULARY if settings.get("vocabulary") else ())]
    names = [target.rsplit(".", 1)[-1] if target in VOCABULARY else target for target in targets]
    chosen = sizes(select(arch, names, experts), rank, 32.0, settings.get("rank_pattern", []))
    ranks = {path: size.rank for path, size in chosen.items()}
    return Adapters(ranks, experts == "each", settings.get("dora", False), settings.get("dropout", 0) > 0)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("memory") / "found.json"
    return json.loads(made_afresh_by("memory_probe", out).read_text())


@pytest.mark.full
@pytest.mark.parametrize("name", sorted({*LAYOUTS, *VARIANT_LAYOUTS}))
def test_weights_and_adapters_equal_the_meta_build_exactly(found, name):
    layout = layout_of(name)
    for stage, held in enumerate(found["meta"][name]):
        assert sum(item.nbytes for item in weights(NANO, layout, stage, 2)) == held["weights"]
        if name in NF4_LAYOUTS:
            assert sum(item.nbytes for item in weights(NANO, layout, stage, 2, nf4=True)) == held["nf4"]
        for variant, settings in VARIANTS.items() if name in VARIANT_LAYOUTS else ():
            made = adapter_weights(NANO, layout, stage, 2, adapters_of(NANO, settings))
            assert sum(item.nbytes for item in made) == held[variant], variant


@pytest.mark.full
@pytest.mark.parametrize("name", DENSE_LAYOUTS)
def test_weights_of_a_dense_member_equal_the_meta_build_exactly(found, name):
    dense, layout = Arch.load(resolve_model("nano-4b")), layout_of(name)
    planned = [sum(item.nbytes for item in weights(dense, layout, stage, 2)) for stage in range(layout.pp)]
    assert planned == [held["weights"] for held in found["dense"][name]]


def standins_keep_more(work: Workload, stage: int) -> int:
    """Bytes that PyTorch on a CPU keeps where the GPU's kernels do not; docs/memory.md lists them."""
    arch, layout, batch = work.arch, work.layout, work.batch
    tokens = batch.seq_length // layout.cp
    local = tokens // layout.tp
    mine = stage_layers(arch, layout, stage)
    total = 0
    for number, letter in mine:
        if letter == "*" and "full" not in batch.recompute:  # the output again, its axes in another order
            total += tokens * arch.num_attention_heads // layout.tp * arch.head_dim * batch.value
        if batch.adapters is not None and batch.adapters.dropout:  # noise in the activation's dtype, no byte mask
            total += sum(
                (tokens if "experts.l" not in linear.path or "shared" in linear.path else local * 2)
                * linear.inputs * (batch.value - 1)
                for linear in linears(arch, layout, number, letter)
            )  # fmt: skip
    return total


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_cpu_ranks_measure_what_is_predicted(found, name):
    text, dtype, settings, recompute = RUNS[name]
    layout_name, _, pattern = text.partition("@")
    nf4 = bool(settings and settings.get("nf4"))
    arch = replace(ARCH, pattern=pattern or ARCH.pattern, **(NF4_WIDTHS if nf4 else {}))
    layout, ranks = layout_of(layout_name), ranks_of(layout_name)
    for rank, measured in enumerate(found["measured"][name]):
        stage = rank // (ranks // layout.pp)
        adapters = None if settings is None else adapters_of(arch, settings, 4)
        work = Workload(
            arch, layout, ranks, PACK, 4, adapters,
            bf16=dtype == "bfloat16", imbalance=measured["imbalance"], recompute=recompute,
            loss_chunk=(settings or {}).get("loss_chunk", 0),
        )  # fmt: skip
        learning = trained_tensors(work, stage)
        assert parameter_bytes(work, learning) == measured["adapters"]
        assert gradient_bytes(work, learning) == measured["gradients"]
        assert optimizer_bytes(work, learning) == pytest.approx(measured["optimizer"], rel=0.01)
        here = kept(arch, layout, stage, replace(work.batch, fused_permute=False)).total
        near = 0.03 if settings is not None or not work.bf16 else 0.08  # BF16 norms with trained weights keep casts
        assert here + standins_keep_more(work, stage) == pytest.approx(measured["activations"], rel=near)
        if settings is not None and not settings.get("dropout"):
            assert here == pytest.approx(measured["activations"], rel=0.1)
            frozen = sum(item.nbytes for item in weights(arch, layout, stage, work.value, nf4))
            assert frozen == measured["weights"]


def nano(layout: Layout, ranks: int, seq_length: int = 4096, **changes: Any) -> Workload:
    """LoRA on the real model with the published targets and rank."""
    return Workload(NANO, layout, ranks, seq_length, 128, adapters_of(NANO, {}), **changes)


def test_published_layouts_fit_on_the_hardware_that_they_were_published_for():
    lora, full = nano(Layout(tp=2, ep=8), 8), nano(Layout(ep=8), 8, 4096)
    assert plan_memory(lora).fits(HARDWARE["h100"])
    assert plan_memory(lora).fits(HARDWARE["gb200"])
    assert plan_memory(replace(full, adapters=None)).fits(HARDWARE["gb200"])
    # The benchmarks' routers were forced to balance.
    pretrain = nano(Layout(ep=8), 8, 8192, imbalance=1.0)
    pretrain = replace(pretrain, adapters=None, global_batch=512, micro_batch=4)
    assert plan_memory(pretrain).fits(HARDWARE["b300"])
    assert plan_memory(pretrain).fits(HARDWARE["gb300"])
    small = replace(pretrain, ranks=16, global_batch=1024, micro_batch=1, recompute=("moe", "layernorm"))
    assert plan_memory(small).fits(HARDWARE["h100"])
    assert not plan_memory(replace(small, recompute=())).fits(HARDWARE["h100"])


def test_weights_are_those_of_the_published_sizing_guide():
    """NVIDIA-NeMo/Nemotron, usage-cookbook/Nemotron-3-Nano/nemotron3-nano-post-training-sizing.md: GiB on each GPU."""
    for layout, published in (
        (Layout(), 58.8), (Layout(ep=2), 31.5), (Layout(ep=4), 17.8), (Layout(ep=8), 10.9), (Layout(tp=2, ep=8), 8.9),
    ):  # fmt: skip
        assert sum(held.nbytes for held in weights(NANO, layout, 0, 2)) / GIB == pytest.approx(published, abs=0.05)


def test_a_plan_is_what_can_be_worked_out_by_hand():
    plan = plan_memory(nano(Layout(ep=8), 8)).tightest
    assert plan.items["weights"] == 11_749_990_016  # 5.875e9 parameters in BF16, FP32 where the checkpoint has it
    trained = 33_368_064
    assert plan.items["adapters"] == 2 * trained
    assert plan.items["gradients (FP32)"] == 4 * trained
    assert plan.items["optimizer"] == 12 * trained // 8  # two moments and a copy, over eight ranks
    assert plan.items["logits"] == 4096 * (131072 * 4 + 9)


def test_a_loss_in_chunks_has_the_logits_of_one_chunk():
    whole = nano(Layout(ep=8), 8, recompute=("full",))
    chunked = replace(whole, loss_chunk=512)
    before, after = plan_memory(whole).tightest.items, plan_memory(chunked).tightest.items
    assert (before["logits"], after["logits"]) == (4096 * (131072 * 4 + 9), 0)
    assert after["kept by the head"] - before["kept by the head"] == 4096 * 2688 * 2  # the gradient of its input
    assert in_loss(NANO, Layout(), chunked.batch) == 512 * (131072 * (4 + 2) + 9)
    gathered = 2 * 4096 * 2688 * 2  # the hidden states of all positions and their gradient
    assert in_loss(NANO, Layout(tp=2), chunked.batch) == 512 * (65536 * (4 + 2) + 9) + gathered
    assert in_loss(NANO, Layout(), replace(whole, loss_chunk=1 << 20).batch) == 4096 * (131072 * (4 + 2) + 9)


def test_what_costs_more_is_planned_to_cost_more():
    base = nano(Layout(ep=8), 8)
    total = plan_memory(base).tightest.total
    assert plan_memory(replace(base, seq_length=8192)).tightest.total > total
    assert plan_memory(replace(base, imbalance=3.0)).tightest.total > total
    for recompute in (("moe_act",), ("moe",), ("shared_experts",), ("layernorm",), ("mamba",), ("full",)):
        assert plan_memory(replace(base, recompute=recompute)).tightest.total < total
    assert plan_memory(replace(base, layout=Layout(ep=8, cp=2))).tightest.total < total
    first, last = plan_memory(replace(base, layout=Layout(ep=8, pp=2), ranks=16)).stages
    assert not first.items["logits"]
    assert last.items["logits"]
    assert first.items["kept by Mamba-2"] > 1.5 * last.items["kept by Mamba-2"]  # two micro batches in flight


def test_the_imbalance_that_still_fits_is_where_the_plan_turns():
    plan = plan_memory(nano(Layout(ep=8), 8, 8192))
    most = plan.largest_imbalance(HARDWARE["h100"])
    assert 1.5 < most < 8
    for imbalance, fits in ((most, True), (most + 0.05, False)):
        assert plan_memory(replace(plan.work, imbalance=imbalance)).fits(HARDWARE["h100"]) is fits
    assert plan_memory(nano(Layout(), 1, 2048)).largest_imbalance(HARDWARE["h100"]) == 1.0
    assert plan_memory(nano(Layout(), 1, 32768)).largest_imbalance(HARDWARE["h100"]) is None
    with pytest.raises(UserError, match=r"imbalance 0\.5 must be at least 1"):
        plan_memory(replace(plan.work, imbalance=0.5))


def test_the_table_adds_up():
    plan = plan_memory(nano(Layout(ep=8, pp=2), 16))
    lines = plan.table(HARDWARE["h100"]).splitlines()
    shown = [float(line.split()[-1]) for line in lines[1:-2]]
    assert sum(shown) == pytest.approx(float(lines[-2].split()[-1]), abs=0.1)
    assert float(lines[-1].split()[-1]) == pytest.approx(79.6 - plan.stages[1].total / GIB, abs=0.01)
