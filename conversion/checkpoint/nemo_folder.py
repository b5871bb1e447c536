"""A NeMo checkpoint read as if it were a Hugging Face folder: tensors by Hugging Face's names, any rows of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conversion.checkpoint.hf_folder import HFFolder, ModelFolder, RowFolder
from conversion.checkpoint.names import VOCABULARY_KEYS, MegatronTensor, RowBlock, megatron_tensors
from conversion.checkpoint.output_folder import LAYOUT, SIDE, WEIGHTS
from conversion.checkpoint.plan import PREFIX
from conversion.checkpoint.safetensors_layout import FileLayout, TensorTable, check_tensors, some
from nano3.arch import Arch, is_nemo_checkpoint, resolve_model
from nano3.cli import UserError
from nano3.sealed_folder import check_seal

if TYPE_CHECKING:
    from conversion.checkpoint.torch_dist import TorchDistReader


class NemoFolder(RowFolder):
    """A NeMo checkpoint that holds exactly the tensors of its config.json. Use as a context manager.

    One of ours must be what was written (`nano3.sealed_folder`), unless `as_is`. `side` is a Hugging Face folder whose
    config.json and side files belong to a checkpoint without its own.

    Raises `UserError`, before anything is read, for missing, unknown or misshapen tensors, by name, and truncated
    files.
    """

    def __init__(self, path: Path, side: Path | None = None, as_is: bool = False) -> None:
        from conversion.checkpoint.torch_dist import TorchDistReader

        if not as_is:
            check_seal(path)
        self.path, self.side = path, side or _own_side(path)
        self.arch = Arch.load(self.side)
        self.reader = TorchDistReader(path / WEIGHTS)
        self.tensors = list(megatron_tensors(self.arch))
        _check_weights(self.reader, self.tensors)
        self._places = _places(self.tensors)
        dtypes = {block.name: self.reader.dtype(PREFIX + t.key) for t in self.tensors for block in t.blocks}
        shapes = {name: spec.shape for name, spec in self.arch.tensors().items()}
        self.layout = _layout(self.path, {name: (dtypes[name], shape) for name, shape in shapes.items()})

    def fill_rows(self, buffer: memoryview, name: str, start: int) -> None:
        """Fills `buffer` with rows `start` and following of a tensor; threads may ask at once."""
        row = self.layout.entries[name].row_bytes
        stop = start + len(buffer) // row
        for tensor, begin, block in self._places[name]:
            low, high = max(start, block.start), min(stop, block.start + block.count)
            if low < high:
                offset, size = tensor.box(begin + low - block.start, high - low)
                part = buffer[(low - start) * row : (high - start) * row]
                self.reader.read_into(part, PREFIX + tensor.key, offset, size)

    def padding_problems(self) -> list[str]:
        """Vocabulary tensors whose rows behind the vocabulary are not zeros: nothing certifies what those hold."""
        problems, begin = [], self.arch.vocab_size
        for key in VOCABULARY_KEYS:
            rows, width = self.reader.shapes[PREFIX + key]
            if rows > begin and self.reader.read(PREFIX + key, (begin, 0), (rows - begin, width)).any():
                problems.append(f"{self.path}: {key} has values behind the {begin} rows of its vocabulary")
        return problems


def named_model(name_or_path: str) -> Path:
    """The folder of a preset, of a Hugging Face model or of a NeMo checkpoint; `UserError` when it is none."""
    path = Path(name_or_path)
    return path if is_nemo_checkpoint(path) else resolve_model(name_or_path)


def open_model(path: Path, quantized: bool = False, as_is: bool = False) -> ModelFolder:
    """The model in a folder, Hugging Face's or NeMo's. `quantized`: FP8 is read too; `as_is`: whatever its seal says.
    Raises `UserError`."""
    return NemoFolder(path, as_is=as_is) if is_nemo_checkpoint(path) else HFFolder(path, quantized, as_is)


def _own_side(source: Path) -> Path:
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give a NeMo checkpoint folder")
    if not (source / SIDE / "config.json").is_file():
        raise UserError(
            f"{source} has no {SIDE}/config.json (a checkpoint of a training run, or no NeMo checkpoint): "
            "name the Hugging Face folder that it came from with --hf"
        )
    return source / SIDE


def _check_weights(reader: TorchDistReader, tensors: list[MegatronTensor]) -> None:
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


Place = tuple[MegatronTensor, int, RowBlock]
"""A Megatron tensor, the row in it at which a block begins, and the block."""


def _places(tensors: list[MegatronTensor]) -> dict[str, list[Place]]:
    """Hugging Face tensor -> where its rows lie, from the first row to the last."""
    places: dict[str, list[Place]] = {}
    for tensor in tensors:
        begin = 0
        for block in tensor.blocks:
            places.setdefault(block.name, []).append((tensor, begin, block))
            begin += block.count
    return {name: sorted(found, key=lambda place: place[2].start) for name, found in places.items()}


def _layout(source: Path, table: TensorTable) -> FileLayout:
    """The files that the checkpoint was made from when its tensors are still the same, else files of our making."""
    if (source / LAYOUT).is_file():
        layout = FileLayout.from_json((source / LAYOUT).read_text())
        if layout.fits(table):
            return layout
    return FileLayout.make(table)
