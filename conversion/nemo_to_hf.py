"""NeMo -> Hugging Face, streaming: no GPU, no model in memory.

    python conversion/nemo_to_hf.py SRC OUT [--hf FOLDER]

SRC is a NeMo checkpoint of this architecture, written by `conversion/hf_to_nemo.py` or by NeMo itself on any parallel
layout. OUT becomes a Hugging Face folder that plain transformers loads. Names, values and dtypes are those of the
checkpoint, the vocabulary's padding is cut off, config.json and tokenizer come from SRC's `hf/` (or `--hf`) unchanged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.folders import HF_KIND, LAYOUT, SIDE, WEIGHTS, copy_files, progress, refuse_overlap, require_space
from conversion.layout import Layout, TensorTable, check_tensors, some
from conversion.names import VOCABULARY_KEYS, MegatronTensor, megatron_tensors
from conversion.plan import PREFIX, row_steps
from conversion.safetensors_io import SafetensorsWriter, side_files
from nano3.arch import Arch, resolve_model
from nano3.cli import UserError, check_output, fresh_output, run

if TYPE_CHECKING:
    from conversion.torch_dist import TorchDistReader


def convert(source: Path, out: Path, hf: Path | None = None) -> int:
    """Writes the Hugging Face folder `out`; returns the bytes of its weights. `UserError` before anything is written.

    `hf` is a Hugging Face folder whose config.json and side files are taken when `source` has no `hf/` of its own.
    """
    side = _side_folder(source, hf)
    refuse_overlap(out, source, side)
    check_output(out, HF_KIND)
    arch = Arch.load(side)
    from conversion.torch_dist import TorchDistReader

    reader = TorchDistReader(source / WEIGHTS)
    tensors = list(megatron_tensors(arch))
    check_weights(reader, tensors)
    layout = _layout(source, _table(arch, reader, tensors))
    require_space(out, layout.total_bytes)
    with fresh_output(out, HF_KIND) as folder:
        copy_files(side, side_files(side), folder)
        with SafetensorsWriter(folder, layout) as writer, progress(layout.total_bytes, "weights") as bar:
            for tensor in tensors:
                _copy(reader, tensor, writer, bar)
    return layout.total_bytes


def check_weights(reader: TorchDistReader, tensors: list[MegatronTensor]) -> None:
    """Raises `UserError` by name for missing, unknown or misshapen tensors; optimizer state is none of our business."""
    expected = {PREFIX + tensor.key: tensor.shape for tensor in tensors}
    found = {key: shape for key, shape in reader.shapes.items() if key.startswith(PREFIX)}
    adapters = [key for key in found if ".adapter." in key]
    if adapters:
        raise UserError(f"{reader.folder} holds adapters ({some(adapters)}): merge them with conversion/merge_lora.py")
    for name in VOCABULARY_KEYS:
        key = PREFIX + name
        rows, *rest = found.get(key, expected[key])
        if rows > expected[key][0]:
            found[key] = (expected[key][0], *rest)  # the padding is cut off
    check_tensors(str(reader.folder), found, expected)


def _side_folder(source: Path, hf: Path | None) -> Path:
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give a NeMo checkpoint folder")
    if hf is not None:
        return hf
    if not (source / SIDE / "config.json").is_file():
        raise UserError(
            f"{source} has no {SIDE}/config.json (a checkpoint of a training run, or no NeMo checkpoint): "
            "name the Hugging Face folder that it came from with --hf"
        )
    return source / SIDE


def _table(arch: Arch, reader: TorchDistReader, tensors: list[MegatronTensor]) -> TensorTable:
    """What to write: the architecture's shapes, the checkpoint's dtypes."""
    dtypes = {block.name: reader.dtype(PREFIX + tensor.key) for tensor in tensors for block in tensor.blocks}
    return {name: (dtypes[name], spec.shape) for name, spec in arch.tensors().items()}


def _layout(source: Path, table: TensorTable) -> Layout:
    """The source's own files when its tensors are still the same, else files of our making."""
    if (source / LAYOUT).is_file():
        layout = Layout.from_json((source / LAYOUT).read_text())
        if layout.fits(table):
            return layout
    return Layout.make(table)


def _copy(reader: TorchDistReader, tensor: MegatronTensor, writer: SafetensorsWriter, bar: Any) -> None:
    """Copies the row blocks of one Megatron tensor to where they belong, in steps of at most a chunk."""
    begin = 0
    for block in tensor.blocks:
        for start, count in row_steps(block.count, writer.layout.entries[block.name].row_bytes):
            offset, size = tensor.box(begin + start, count)
            rows = reader.read(PREFIX + tensor.key, offset, size).view(count, *tensor.row_shape)
            writer.write(block.name, block.start + start, rows)
            bar.update(rows.nbytes)
        begin += block.count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="NeMo checkpoint folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="Hugging Face model folder to write")
    parser.add_argument(
        "--hf", metavar="FOLDER", help="folder (or preset) whose config.json and tokenizer belong to SRC"
    )
    args = parser.parse_args()
    size = convert(args.source, args.out, resolve_model(args.hf) if args.hf else None)
    print(f"{args.out}: Hugging Face model, {size / 1e9:.3f} GB of weights")
    return 0


if __name__ == "__main__":
    run(main)
