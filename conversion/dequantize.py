"""FP8 -> BF16: a plain Hugging Face folder with the values that an FP8 checkpoint stands for, streaming.

    python conversion/dequantize.py FP8 OUT

transformers does not read ModelOpt's FP8: it takes the codes for numbers. OUT holds code * scale, rounded to BF16,
which any tool reads, and the scales of activations and cache in fp8_activations.json: evaluation/evaluate.py rounds
both as a server would (nano3/fp8_emulation.py). So the cost of FP8 is measured before a GPU sees the checkpoint.
--weights-only leaves that file out: what is measured then is FP8's cost in the weights alone.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
    from nano3.outputs import check_output
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.model_folder import HFFolder, side_files
from conversion.checkpoint.output_folder import HF_KIND, copy_files, refuse_overlap, unfinished_output
from conversion.checkpoint.pieces import STEP_BYTES, row_steps
from conversion.checkpoint.safetensors_layout import FP8, FileLayout
from conversion.checkpoint.safetensors_writer import Passage, rewrite
from conversion.fp8.selection import scale_problem
from conversion.identity import source_stamps, weight_files

if TYPE_CHECKING:
    import torch

    from nano3.fp8_emulation import ActivationScales

QUANT_CONFIG = "hf_quant_config.json"


def values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """code * scale in FP32, rounded to BF16; `codes` FP8 of any shape, `scale` one FP32 value."""
    import torch

    return (codes.float() * scale).to(torch.bfloat16)


def dequantize(source: Path, out: Path, activations: bool = True) -> int:
    """Writes the plain folder `out`; returns how many matrices were FP8. Raises `UserError`.

    With `activations` the scales of activations and cache go along, and evaluation rounds both.
    """
    refuse_overlap(out, source)
    check_output(out, HF_KIND)
    with HFFolder(source, quantized=True) as hf:
        coded = [name for name, entry in hf.layout.entries.items() if entry.dtype == FP8]
        if not coded:
            raise UserError(f"{source} has no FP8 tensor; it can be used as it is")
        for name in coded:
            scale_of(hf, f"{name}_scale")
        scales = activation_scales(hf) if activations else None
        dtypes = {name: "BF16" if name in coded else dtype for name, dtype in hf.dtypes.items()}
        shapes = {name: spec.shape for name, spec in hf.arch.tensors().items()} | hf.carried
        layout = FileLayout.make({name: (dtypes[name], shape) for name, shape in shapes.items()})
        job: dict[str, Any] = {"tool": "dequantize", "source": str(source.resolve()), "activations": activations}
        job["files"] = source_stamps(weight_files(hf))
        with unfinished_output(out, HF_KIND, job | {"layout": layout.to_json()}, layout.total_bytes) as work:
            side = [path for path in side_files(source) if path.name not in ("config.json", QUANT_CONFIG)]
            copy_files(source, side, work.folder)
            if scales is not None:
                scales.write(work.folder)
            (work.folder / "config.json").write_text(json.dumps(hf.config, indent=2) + "\n")
            changes = {name: partial(_decode, hf.rows(f"{name}_scale", 0, 1)) for name in coded}
            rewrite(hf, work, layout, changes, {}, "dequantize")
    return len(coded)


def activation_scales(hf: HFFolder) -> ActivationScales:
    """Scales of every FP8 matrix's input and of the cache. Raises `UserError` for one that is missing or no scale."""
    from nano3.fp8_emulation import ActivationScales

    coded = [name.removesuffix(".weight") for name, entry in hf.layout.entries.items() if entry.dtype == FP8]
    cached = [name for name in hf.layout.entries if name.endswith((".k_scale", ".v_scale"))]
    return ActivationScales.shared(
        {name: scale_of(hf, f"{name}.input_scale") for name in coded},
        {name.rpartition(".")[0]: scale_of(hf, name) for name in cached},
    )


def scale_of(hf: HFFolder, name: str) -> float:
    """A scale of the checkpoint. Raises `UserError` when it is missing or not one positive FP32 value."""
    entry = hf.layout.entries.get(name)
    if entry is None:
        raise UserError(f"{hf.path} lacks {name}: export it again")
    value = float(hf.rows(name, 0, 1).view(-1)[0])
    problem = scale_problem(entry.dtype, entry.shape, value)
    if problem is not None:
        raise UserError(f"{hf.path}: {name} {problem}; this reads one scale for each tensor: export it again")
    return value


def _decode(scale: torch.Tensor, passage: Passage) -> None:
    rows, width = passage.entry.shape
    for start, count in row_steps(rows, 4 * width, STEP_BYTES):  # in FP32
        passage.write(start, values(passage.read(start, count), scale))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="FP8", type=Path, help="folder that conversion/quantize_fp8.py wrote")
    parser.add_argument("out", metavar="OUT", type=Path, help="Hugging Face model folder to write")
    parser.add_argument("--weights-only", action="store_true", help="leave out the scales of activations and cache")
    args = parser.parse_args()
    count = dequantize(args.source, args.out, activations=not args.weights_only)
    rest = "are not quantized" if args.weights_only else "are rounded by evaluation/evaluate.py as a server would"
    print(f"{args.out}: {count} FP8 matrices as BF16; their activations and the cache {rest}")
    return 0


if __name__ == "__main__":
    run(main)
