"""Run by tests/conversion/test_fp8_calibration.py: peak memory of a calibration and of golden answers.

python -m tests.helpers.memory_of_layers HF_FOLDER SCRATCH

Prints two numbers, bytes above what the process had before each.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import torch

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import UnfinishedOutput
from conversion.fp8.calibrate import calibrate
from conversion.fp8.golden_passes import Way, answers
from conversion.fp8.selection import Selection
from tests.helpers.tiny import tiny_hf_folder


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def run(folder: Path, beside: Path, what: str) -> int:
    """Bytes that the work took at its peak above what was there before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, samples = status("VmRSS"), [np.arange(5, 37), np.arange(3, 60)]
    with HFFolder(folder) as hf:
        if what == "calibrate":
            calibrate(
                hf, Selection.published(hf.arch), samples, UnfinishedOutput(beside / folder.name), lambda _tokens: None
            )
        else:
            answers(hf, samples, Way(torch.float32, None), beside)
    return status("VmHWM") - before


def main() -> None:
    folder, beside = Path(sys.argv[1]), Path(sys.argv[2])
    small = tiny_hf_folder(beside.parent / "small", hybrid_override_pattern="ME*")
    for what in ("calibrate", "golden"):
        run(small, beside, what)  # what is imported and kept counts before, not in
        print(run(folder, beside, what))


if __name__ == "__main__":
    main()
