"""The throughput estimate: by hand where it can be, and its error on published rows where docs/memory.md prints it."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan.hardware import HARDWARE
from launch.plan.layout import Layout
from launch.plan.memory import Workload
from launch.plan.throughput import GEMM, HOST_ADAPTER, HOST_LAYER, LINK, errors, estimate, published, stage_share
from launch.plan.weights import Adapters
from nano3.arch import Arch, resolve_model
from nano3.flops import forward_flops
from nano3.targets import PRESETS, select

NANO = Arch.load(resolve_model("nano"))
H100 = HARDWARE["h100"]


def work(**changes) -> Workload:
    paths = select(NANO, PRESETS["all"], "shared")
    base = Workload(NANO, Layout(ep=8), 8, 65536, 8, Adapters(dict.fromkeys(paths, 32)), imbalance=1.0)
    return replace(base, **changes)


def test_the_documented_table_is_what_the_code_says():
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    assert errors(NANO) in text


def test_no_published_row_is_off_by_more_than_a_third():
    for row in published(NANO):
        guess = estimate(row.work, HARDWARE[row.gpu], row.fp8).tokens_per_second
        assert guess == pytest.approx(row.tokens_per_second, rel=0.33), row.what


def test_parts_of_a_step_are_what_can_be_worked_out_by_hand():
    found = estimate(work(), H100)
    products, between = forward_flops(NANO, [65536])
    # One micro batch a step; the frozen layers' weights have no gradient, so backward costs as much as forward.
    assert found.compute == pytest.approx((2 * products + 3 * between) / (H100.bf16 * GEMM))
    tokens = 65536 * 2688 * 2  # bytes of the hidden states
    assert found.exchange == pytest.approx(23 * 4 * 6 * tokens * 7 / 8 / (H100.nvlink * LINK))
    assert (found.host, found.bubble) == (0, 0)
    assert found.tokens_per_second == pytest.approx(65536 / found.seconds)


def test_short_packs_wait_for_the_host():
    short, adapters = work(seq_length=1024), len(work().adapters.ranks)
    assert estimate(short, H100).seconds == pytest.approx(52 * HOST_LAYER + adapters * HOST_ADAPTER)


def test_what_slows_a_step_down_is_estimated_to():
    base = estimate(work(), H100).tokens_per_second
    for slower in (
        work(imbalance=2.0),
        work(recompute=("moe",)),
        work(recompute=("full",)),
        work(layout=Layout(tp=2, ep=8)),
        work(layout=Layout(ep=8, pp=2), ranks=16),
        work(layout=Layout(ep=16), ranks=16, global_batch=16),  # the experts' exchange leaves the NVLink domain
        work(adapters=None),
    ):
        assert estimate(slower, H100).tokens_per_second < base
    assert estimate(work(), HARDWARE["b300"]).tokens_per_second > base


def test_stages_share_the_whole_model():
    for layout in (Layout(), Layout(pp=2), Layout(pp=5)):
        assert sum(stage_share(NANO, layout, stage) for stage in range(layout.pp)) == pytest.approx(1.0)


def test_a_pipeline_waits_for_its_other_stages():
    one = estimate(work(layout=Layout(ep=8, pp=2), ranks=16), H100)
    many = estimate(work(layout=Layout(ep=8, pp=2), ranks=16, global_batch=64), H100)
    assert one.bubble == pytest.approx(one.compute + one.memory + one.exchange + one.host)
    assert many.bubble == pytest.approx(one.bubble)
