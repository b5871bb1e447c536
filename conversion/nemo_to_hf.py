"""NeMo -> Hugging Face, streaming: no GPU, no model in memory.

    python conversion/nemo_to_hf.py SRC OUT [--hf FOLDER]

SRC is a NeMo checkpoint of this architecture, written by `conversion/hf_to_nemo.py` or by NeMo itself on any parallel
layout. OUT becomes a Hugging Face folder that plain transformers loads. Names, values and dtypes are those of the
checkpoint, the vocabulary's padding is cut off, config.json and tokenizer come from SRC's `hf/` (or `--hf`) unchanged.
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
import time
from pathlib import Path
from typing import Any

from conversion.certificates.certificate import Claim, write_certificate
from conversion.checkpoint.model_folder import NemoFolder, side_files
from conversion.checkpoint.output_folder import (
    HF_KIND,
    add_push,
    check_room,
    copy_files,
    progress,
    rate,
    refuse_overlap,
    unfinished_output,
)
from conversion.checkpoint.pieces import PIECE, in_parallel, scratch
from conversion.checkpoint.plan import Planned
from conversion.checkpoint.safetensors_writer import SafetensorsWriter
from conversion.checkpoint.tensor_digests import largest_magnitude, refuse_not_finite
from conversion.checkpoint.tensor_groups import TensorGroup, tensor_groups, tensor_names
from conversion.identity import source_stamps
from conversion.push import Hub
from nano3.arch import resolve_model


def convert(source: Path, out: Path, hf: Path | None = None) -> int:
    """Writes the Hugging Face folder `out`; returns the bytes of its weights.

    Raises `UserError`, and then leaves nothing.

    `hf` is a Hugging Face folder whose config.json and side files are taken when `source` has no `hf/` of its own.
    """
    with NemoFolder(source, hf) as model:
        refuse_overlap(out, source, model.side)
        check_output(out, HF_KIND)
        layout = model.layout
        check_room(out, layout.total_bytes)
        job = {"tool": "export", "source": str(source.resolve()), "files": source_stamps(model.reader.files)}
        job |= {"side": str(model.side.resolve()), "layout": layout.to_json()}
        with unfinished_output(out, HF_KIND, job, layout.total_bytes) as work:
            copy_files(model.side, side_files(model.side), work.folder)
            with SafetensorsWriter(work, layout) as writer, progress(layout.total_bytes, "weights") as bar:
                _write(model, writer, bar)
            write_certificate(work.folder, source, writer.facts, writer.facts, Claim("export"))
    return layout.total_bytes


def _write(model: NemoFolder, writer: SafetensorsWriter, bar: Any) -> None:
    """Copies every tensor to where it belongs, group by group, file by file."""
    entries, todo = writer.layout.entries, writer.todo
    order = {name: number for number, name in enumerate(todo)}
    planned = [Planned(tensor, tensor.shape, entries[tensor.blocks[0].name].dtype) for tensor in model.tensors]
    tasks = [
        group
        for group in tensor_groups(planned, {name: entry.rows for name, entry in entries.items()})
        if not order.keys().isdisjoint(tensor_names(group))
    ]
    bar.update(sum(entry.stop - entry.start for name, entry in entries.items() if name not in order))

    def do(group: TensorGroup) -> None:
        # Of tensors that are one in Megatron, those in a file that is finished already are left out.
        left = [name for name in tensor_names(group) if name in order]
        for chunk in group:
            buffer = scratch(chunk.nbytes)
            model.reader.read_into(buffer, chunk.planned.key, *chunk.tensor.box(chunk.first, chunk.count))
            for begin, part in chunk.parts():
                if part.name in left:
                    entry = entries[part.name]
                    end = begin + part.count * entry.row_bytes
                    for first in range(begin, end, PIECE):
                        piece = buffer[first : min(first + PIECE, end)]
                        refuse_not_finite(largest_magnitude(piece, entry.dtype), part.name, model.path)
                        writer.put(part.name, piece)
                    bar.update(end - begin)
        for name in left:
            writer.done(name)

    in_parallel(sorted(tasks, key=lambda group: min(order.get(name, len(order)) for name in tensor_names(group))), do)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="NeMo checkpoint folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="Hugging Face model folder to write")
    parser.add_argument(
        "--hf", metavar="FOLDER", help="folder (or preset) whose config.json and tokenizer belong to SRC"
    )
    add_push(parser)
    args = parser.parse_args()
    hub = Hub(args.push) if args.push else None  # refuses at once what would fail after hours
    begin = time.monotonic()
    size = convert(args.source, args.out, resolve_model(args.hf) if args.hf else None)
    print(f"{args.out}: Hugging Face model, {rate(size, time.monotonic() - begin)}")
    if hub is not None:
        print(hub.upload(args.out))
    return 0


if __name__ == "__main__":
    run(main)
