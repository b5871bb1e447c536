"""A NeMo checkpoint read as if it were a Hugging Face folder: tensors by Hugging Face's names, any rows of them."""

from __future__ import annotations

from pathlib import Path

from conversion.folders import LAYOUT, SIDE, WEIGHTS
from conversion.layout import Layout, TensorTable
from conversion.model_folder import ModelFolder, RowFolder
from conversion.names import VOCABULARY_KEYS, MegatronTensor, RowBlock, megatron_tensors
from conversion.plan import PREFIX
from conversion.safetensors_io import HFFolder
from nano3.arch import Arch, is_nemo_checkpoint, resolve_model


class NemoFolder(RowFolder):
    """A NeMo checkpoint that holds exactly the tensors of `hf/config.json`. Use as a context manager.

    Raises `UserError`, before anything is read, for what `conversion/nemo_to_hf.py` refuses: missing, unknown or
    misshapen tensors, by name, and truncated files.
    """

    def __init__(self, path: Path | str) -> None:
        from conversion.nemo_to_hf import check_weights
        from conversion.torch_dist import TorchDistReader

        self.path = Path(path)
        self.side = self.path / SIDE
        self.arch = Arch.load(self.side)
        self._reader = TorchDistReader(self.path / WEIGHTS)
        tensors = list(megatron_tensors(self.arch))
        check_weights(self._reader, tensors)
        self._places = _places(tensors)
        dtypes = {block.name: self._reader.dtype(PREFIX + t.key) for t in tensors for block in t.blocks}
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
                self._reader.read_into(part, PREFIX + tensor.key, offset, size)

    def padding_problems(self) -> list[str]:
        """Vocabulary tensors whose rows behind the vocabulary are not zeros: nothing certifies what those hold."""
        problems, begin = [], self.arch.vocab_size
        for key in VOCABULARY_KEYS:
            rows, width = self._reader.shapes[PREFIX + key]
            if rows > begin and self._reader.read(PREFIX + key, (begin, 0), (rows - begin, width)).any():
                problems.append(f"{self.path}: {key} has values behind the {begin} rows of its vocabulary")
        return problems


def named_model(name_or_path: str) -> Path:
    """The folder of a preset, of a Hugging Face model or of a NeMo checkpoint; `UserError` when it is none."""
    path = Path(name_or_path)
    return path if is_nemo_checkpoint(path) else resolve_model(name_or_path)


def open_model(path: Path, quantized: bool = False) -> ModelFolder:
    """The model in a folder, Hugging Face's or NeMo's. `quantized`: FP8 is read too. Raises `UserError`."""
    return NemoFolder(path) if is_nemo_checkpoint(path) else HFFolder(path, quantized)


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


def _layout(source: Path, table: TensorTable) -> Layout:
    """The files that the checkpoint was made from when its tensors are still the same, else files of our making."""
    if (source / LAYOUT).is_file():
        layout = Layout.from_json((source / LAYOUT).read_text())
        if layout.fits(table):
            return layout
    return Layout.make(table)
