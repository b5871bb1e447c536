"""The writing of an FP8 checkpoint alone, for bench_conversion.py: MODEL OUT. Activation scales are made up."""

from __future__ import annotations

import sys
from pathlib import Path

from conversion.checkpoint.model_folder import HFFolder
from conversion.checkpoint.output_folder import HF_KIND, unfinished_output
from conversion.checkpoint.tensor_digests import scan
from conversion.fp8.calibrate import Activations
from conversion.fp8.selection import Selection
from conversion.quantize_fp8 import weight_scales, write


def main(source: Path, out: Path) -> None:
    """What conversion/quantize_fp8.py does but for the calibration."""
    with HFFolder(source) as hf:
        selection = Selection.published(hf.arch)
        before, largest = scan(hf)
        found = Activations(
            inputs=dict.fromkeys(selection.chosen, 1.0),
            cache={(number, part): 1.0 for number in selection.kv_layers for part in "kv"},
        )
        with unfinished_output(out, HF_KIND, {"source": str(source)}, 0) as work:
            write(hf, before, weight_scales(largest, selection), selection, found, work)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
