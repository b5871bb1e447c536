"""The table of GPUs agrees with itself and with what the data sheets print for whole systems."""

import pytest

from launch import preflight
from launch.plan.hardware import GIB, HARDWARE, find_gpu
from launch.plan.layout import Layout
from nano3.cli import UserError


@pytest.mark.parametrize(
    ("name", "gpus", "fp8_petaflops_sparse", "terabytes"),
    [("b200", 8, 72, 1.44), ("b300", 8, 72, 2.1), ("gb200", 72, 720, 13.4), ("gb300", 72, 720, 20.0)],
)
def test_systems_add_up_to_their_data_sheets(name, gpus, fp8_petaflops_sparse, terabytes):
    gpu = HARDWARE[name]
    # Dense BF16 is a quarter of what they print: half of it for FP8, half of that for sparsity.
    assert gpus * gpu.bf16 * 4 == fp8_petaflops_sparse * 1e15
    # A data sheet's GB are GiB to within 1 %, less what the driver keeps.
    assert gpu.memory_gib * gpus / 1000 == pytest.approx(terabytes, rel=0.015)


@pytest.mark.parametrize("gpu", HARDWARE.values(), ids=lambda gpu: gpu.name)
def test_every_figure_is_plausible_and_has_a_source(gpu):
    assert gpu.nvlink_domain % gpu.gpus_per_node == 0
    assert gpu.network < gpu.nvlink < gpu.hbm
    assert gpu.memory == int(gpu.memory_gib * GIB)
    assert "data sheet" in gpu.source


def test_a_generation_is_not_smaller_than_the_one_before():
    names = ("h100", "h200", "b200", "b300")
    assert sorted(names, key=lambda name: HARDWARE[name].memory) == list(names)


def test_names_are_found_in_any_case_and_others_are_refused():
    assert find_gpu("H100") is HARDWARE["h100"]
    with pytest.raises(UserError, match="'a100' is not known; choose one of h100, h200, b200"):
        find_gpu("a100")


@pytest.mark.parametrize("name", ["rtx4090", "rtx5090", "l40s", "a6000", "a10g", "l4"])
def test_a_single_card_is_planned_alone_or_beside_others(name):
    gpu = HARDWARE[name]
    assert 22 <= gpu.memory_gib <= 48
    assert (gpu.gpus_per_node, gpu.most_per_node) == (1, 8)
    assert HARDWARE["h100"].most_per_node == 8
    assert HARDWARE["gb200"].most_per_node == 4
    assert preflight.read_request(preflight.parser().parse_args(["--hardware", name])).ranks == 1
    eight = ["--hardware", name, "--gpus-per-node", "8"]
    assert preflight.read_request(preflight.parser().parse_args(eight)).plan.layout == Layout(ep=8)
    with pytest.raises(UserError, match="from 1 to 8"):
        preflight.read_request(preflight.parser().parse_args([*eight[:-1], "9"]))


def test_the_base_in_bf16_does_not_fit_one_card():
    code, text = preflight.report(preflight.read_request(preflight.parser().parse_args(["--hardware", "l40s"])), False)
    assert code == 1
    assert text.startswith("DOES NOT FIT: ")
