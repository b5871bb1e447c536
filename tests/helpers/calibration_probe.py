"""Run by tests/launch/test_plan_export.py: what calibrating one layer takes beyond what the process has anyway.

python -m tests.helpers.calibration_probe OUT.json
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import UnfinishedOutput
from conversion.fp8.calibrate import calibrate
from conversion.fp8.selection import Selection
from tests.helpers.calibration_cases import CASES
from tests.helpers.tiny import tiny_hf_folder


def resident(which: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since it was reset."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) * 1024


def peak(pattern: str, tokens: int, sizes: dict[str, int]) -> int:
    """Bytes at the peak of calibrating on two samples, over those before."""
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_hf_folder(Path(name) / "model", hybrid_override_pattern=pattern, **sizes)
        samples = [np.arange(tokens) % 100 + 3] * 2
        with HFFolder(folder) as hf:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            calibrate(
                hf, Selection.published(hf.arch), samples, UnfinishedOutput(Path(name) / "out"), lambda _tokens: None
            )
            return resident("VmHWM") - before


def main() -> None:
    for case in (("M", 64, {}), CASES["experts"]):
        peak(*case)  # what is imported and allocated once
    found = {"imported": resident("VmRSS")} | {name: peak(*case) for name, case in CASES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
