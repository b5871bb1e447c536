"""Hugging Face -> NeMo, streaming: no GPU, no model in memory.

    python conversion/hf_to_nemo.py SRC OUT

SRC is a Hugging Face folder (or a preset: pico). OUT becomes a NeMo 2 checkpoint: `weights/` (Megatron's torch_dist,
loads on any parallel layout), `context/` (NeMo's description of model and tokenizer), `hf/` (config.json, tokenizer
and everything else of SRC but its weights, byte for byte) and `base.json` (SRC's content hash, see
conversion/identity.py). `conversion/nemo_to_hf.py` gives SRC back, bit for bit.
"""

from __future__ import annotations

try:
    from nano3.cli import run
    from nano3.outputs import check_output
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import shutil
import time
from pathlib import Path

from conversion.certificates.certificate import Claim, base_revision, write_certificate
from conversion.checkpoint.model_folder import HFFolder, ModelFolder, side_files
from conversion.checkpoint.output_folder import (
    CONTEXT,
    LAYOUT,
    NEMO_KIND,
    SIDE,
    UnfinishedOutput,
    copy_files,
    progress,
    rate,
    refuse_overlap,
    unfinished_output,
)
from conversion.checkpoint.pieces import CHUNK_BYTES
from conversion.checkpoint.plan import Plan, make_plan
from conversion.checkpoint.tensor_digests import Fact, content_hash
from conversion.identity import Watch, record, source_stamps, weight_files
from nano3.arch import resolve_model
from nano3.quiet import quiet_imports


def convert(source: Path, out: Path, context: bool = True) -> int:
    """Writes the NeMo checkpoint `out`; returns the bytes of its weights. Raises `UserError`, and then leaves nothing.

    `context=False` leaves NeMo's `context/` out: the weights load with plain megatron-core, and NeMo is not imported.
    """
    refuse_overlap(out, source)
    check_output(out, NEMO_KIND)
    with HFFolder(source) as hf:
        plan = make_plan(hf.arch, hf.dtypes, hf.carried)
        side = side_files(source)
        needed = plan.total_bytes + sum((source / path).stat().st_size for path in side)
        watch, stamps = Watch(hf), source_stamps(weight_files(hf))
        job = {"tool": "import", "source": str(source.resolve()), "files": stamps, "chunk": CHUNK_BYTES}
        with unfinished_output(out, NEMO_KIND, job | {"layout": hf.layout.to_json()}, needed) as work:
            facts = write_checkpoint(work, hf, plan, context)
            watch.done(content_hash(facts), all_read=not work.resumed)
            record(work.folder, facts, base_revision(source, content_hash(facts)))
            write_certificate(work.folder, source, facts, facts, Claim("import"))
    return plan.total_bytes


def write_checkpoint(work: UnfinishedOutput, model: ModelFolder, plan: Plan, context: bool) -> dict[str, Fact]:
    """Writes all of a NeMo checkpoint but what it says of its origin; returns the facts of its tensors."""
    from conversion.checkpoint.torch_dist_writer import write_weights

    with progress(plan.total_bytes, "weights") as bar:
        facts = write_weights(work, plan, model, bar.update)
    copy_files(model.side, side_files(model.side), work.folder / SIDE)
    (work.folder / LAYOUT).write_text(model.layout.to_json())
    if context:
        with quiet_imports():
            from nano3.checkpoints.nemo_context import write_context

        shutil.rmtree(work.folder / CONTEXT, ignore_errors=True)
        write_context(work.folder / CONTEXT, work.folder / SIDE)
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SRC", help="Hugging Face model folder, or a preset name such as pico")
    parser.add_argument("out", metavar="OUT", type=Path, help="NeMo checkpoint folder to write")
    parser.add_argument(
        "--no-context", action="store_true", help="leave out context/ and do not import NeMo (saves some 10 s)"
    )
    args = parser.parse_args()
    begin = time.monotonic()
    size = convert(resolve_model(args.source), args.out, context=not args.no_context)
    print(f"{args.out}: NeMo checkpoint, {rate(size, time.monotonic() - begin)}")
    return 0


if __name__ == "__main__":
    run(main)
