"""Calibration and golden answers go layer by layer: what that takes, and that it is what the whole model gives."""

import subprocess
import sys
from pathlib import Path

import pytest

from conversion.checkpoint.safetensors_io import HFFolder
from conversion.fp8.layerwise import hidden_bytes
from nano3.arch import PRESETS
from tests.test_fp8 import samples
from tests.tiny import tiny_hf_folder

LAYER = 2 * 64 * 2 * 512 * 1024
"""Bytes in BF16 of the experts of a layer below: up and down of 64 experts of 512 x 1024."""


def test_disk_is_known_before_it_starts():
    import torch

    with HFFolder(PRESETS["pico"]) as hf:
        assert hidden_bytes(hf, samples(), torch.bfloat16) == 2 * 113 * 128 + 3 * 128  # 113 tokens, 128 wide, 3 files


@pytest.mark.full
def test_memory_is_that_of_one_layer(tmp_path):
    """Five layers of 134 MB: never are two in memory, and no layer is there twice."""
    folder = tiny_hf_folder(
        tmp_path / "hf",
        hybrid_override_pattern="ME*EEEE",
        hidden_size=512,
        n_routed_experts=64,
        moe_intermediate_size=1024,
    )
    command = [sys.executable, "-m", "tests.memory_of_layers", str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calibration, golden = (int(line) for line in done.stdout.split()[-2:])
    print(f"one layer {LAYER / 1e6:.0f} MB; calibration took {calibration / 1e6:.0f} MB, golden {golden / 1e6:.0f} MB")
    assert LAYER < calibration < 1.5 * LAYER
    assert 2 * LAYER < golden < 2 * 1.5 * LAYER  # FP32
