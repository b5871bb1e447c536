"""The plan of import, merge and calibration: disk to the byte, memory as an upper bound that is not far off."""

from __future__ import annotations

import json

import pytest

from conversion.checkpoint import pieces
from conversion.checkpoint.safetensors_layout import FileLayout
from conversion.fp8 import layerwise
from conversion.fp8.selection import Selection
from launch.plan import plan_export
from launch.plan.hardware import GIB
from launch.plan.plan_export import calibration_bytes, fp8_bytes, model_bytes
from nano3.arch import Arch, resolve_model
from tests.helpers.calibration_cases import CASES
from tests.helpers.probes import made_afresh_by
from tests.helpers.tiny import TINY_CONFIG

FIXED = 5_000_000
"""Bytes that a calibration takes whatever it calibrates, measured; part of the plan's process."""

NANO, PICO = (Arch.load(resolve_model(name)) for name in ("nano", "pico"))


@pytest.mark.parametrize("arch", [NANO, PICO], ids=["nano", "pico"])
def test_disk_is_what_the_writers_write(arch):
    dtypes = {name: spec.dtype for name, spec in arch.tensors().items()}

    def written(table):
        made = FileLayout.make(table)
        return sum(entry.stop - entry.start for entry in made.entries.values())

    assert fp8_bytes(arch) == written(Selection.published(arch).table(dtypes))
    assert model_bytes(arch) == written({name: (dtypes[name], spec.shape) for name, spec in arch.tensors().items()})


def test_the_real_model_in_numbers():
    merge, quantize = plan_export.plan_export(NANO)[1:]
    # 31,577,937,344 parameters in BF16; in FP32 A_log and D of 64 heads in 23 layers, and 23 * 128 router biases.
    assert model_bytes(NANO) == 2 * 31_577_937_344 + 2 * 23 * 2 * 64 + 4 * 23 * 128
    assert fp8_bytes(NANO) == pytest.approx(32.65e9, rel=1e-3)  # as the published FP8 checkpoint weighs
    assert quantize.scratch == (1024 + 4) * (2 * 4096 * 2688 + 128)
    experts = 128 * 2 * 2688 * 1856 * 2
    shared_and_rest = 2 * 2688 * 3712 * 2 + (128 * 2688 + 128 + 2688) * 2
    routed = experts + shared_and_rest + 4 * 4096 * 2 * (2688 + 3712 + 1856)
    mamba = 2 * (10304 * 2688 + 2688 * 4096 + 6144 * 4 + 6144 + 3 * 64 + 2688 + 4096)
    mamba += 4 * 4096 * (8 * 2688 + 6 * 64 * 128 + 12 * 4096)
    assert calibration_bytes(NANO, 1, 4096) == routed
    assert calibration_bytes(NANO, 0, 4096) == mamba < routed
    assert quantize.memory == plan_export.PROCESS + routed
    assert merge.memory < 3 * GIB  # whatever the model


def test_a_dense_member_is_imported_and_merged_and_not_quantized():
    dense = Arch.load(resolve_model("nano-4b"))
    assert [plan.name for plan in plan_export.plan_export(dense)] == ["import", "merge"]
    # 3,973,556,832 parameters in BF16, and A_log and D of 96 heads in 21 layers in FP32.
    assert model_bytes(dense) == 2 * 3_973_556_832 + 2 * 21 * 2 * 96


def test_the_streaming_scripts_have_the_buffers_that_are_planned():
    assert (pieces.MOST, pieces.CHUNK_BYTES, pieces.STEP_BYTES) == (
        plan_export.THREADS, plan_export.CHUNK, plan_export.STEP,
    )  # fmt: skip
    assert layerwise.BLOCK_TOKENS == plan_export.BLOCK_TOKENS


@pytest.mark.full
def test_calibration_takes_no_more_than_planned_and_not_much_less(tmp_path):
    out = tmp_path / "found.json"
    # Freed memory goes back at once, as that of a real model's tensors does, which are larger than 32 MiB.
    heap = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}
    found = json.loads(made_afresh_by("calibration_probe", out, **heap).read_text())
    assert found.pop("imported") < plan_export.PROCESS
    for name, (pattern, tokens, sizes) in CASES.items():
        arch = Arch.from_config(TINY_CONFIG | {"hybrid_override_pattern": pattern} | sizes)
        planned = calibration_bytes(arch, 0, tokens)
        assert found[name] - FIXED <= planned <= 1.35 * found[name], (name, found[name], planned)
