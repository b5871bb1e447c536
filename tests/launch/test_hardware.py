"""The table of GPUs agrees with itself and with what the data sheets print for whole systems."""

import pytest

from launch.plan.hardware import GIB, HARDWARE, find_gpu
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
