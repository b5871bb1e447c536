"""What a model on disk is to its readers: tensors by Hugging Face's names, any bytes of them, in flat memory.

`HFFolder` reads Hugging Face's form, `NemoFolder` NeMo's, both checked when they are opened; `SafetensorsFolder` reads
the tensors of any model. Only `rows` touches torch:
bad input is refused before it loads.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.checkpoint.output_folder import CARD, CERTIFICATE, LAYOUT, SIDE, WEIGHTS
from conversion.checkpoint.pieces import read_exactly
from conversion.checkpoint.plan import PREFIX
from conversion.checkpoint.safetensors_layout import INDEX, FileLayout, TensorTable, check_tensors, some, torch_dtype
from nano3.arch import MTP, Arch, is_nemo_checkpoint, resolve_model
from nano3.cli import UserError
from nano3.documents import read_bytes
from nano3.hf_config import FP8_ACTIVATIONS, is_plain, read_config
from nano3.sealed_folder import MARKER, SEAL, check_seal, require_inside
from nano3.tensor_names import VOCABULARY_KEYS, MegatronTensor, RowBlock, carried_tensors, megatron_tensors

if TYPE_CHECKING:
    from typing import Self

    import torch

    from conversion.checkpoint.torch_dist import TorchDistReader

FOREIGN_WEIGHTS = (".gguf", ".bin", ".pt", ".pth")
"""How weights end in forms that this project never writes, which some readers load in place of or on top of ours."""
SIGNATURE = "model.sig"
"""OpenSSF's signature of a folder (docs/certificate.md); it says nothing of what is made from the folder."""
WEIGHT_ENDS = (".safetensors", *FOREIGN_WEIGHTS)


def side_files(folder: Path) -> list[Path]:
    """Everything in a model folder but weights and hidden files, relative to it: configuration, tokenizer, licence.

    Raises `UserError` for a link that leads out of the folder: what is copied along must be the model's.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts) and not _is_weights(relative):
            require_inside(folder, path)
            found.append(relative)
    return found


class TensorFolder(ABC):
    """Tensors with Hugging Face's names, of any model. Use as a context manager."""

    path: Path
    side: Path
    """The folder with config.json and tokenizer."""
    layout: FileLayout
    """Dtype, shape and bytes of every tensor, as it lies or would lie in safetensors files."""

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor."""
        return {name: entry.dtype for name, entry in self.layout.entries.items()}

    def rows(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows `start` to `start + count` of a tensor, in its dtype."""
        buffer = bytearray(count * self.layout.entries[name].row_bytes)
        return self.rows_into(memoryview(buffer), name, start, count)

    def rows_into(self, buffer: memoryview, name: str, start: int, count: int) -> torch.Tensor:
        """The same in memory of the caller, who has `buffer` as large as the rows; the tensor is a view of it."""
        import torch

        entry = self.layout.entries[name]
        self.read_into(buffer, name, start * entry.row_bytes)
        return torch.frombuffer(buffer, dtype=torch_dtype(entry.dtype)).view(count, *entry.shape[1:])

    @abstractmethod
    def read_into(self, buffer: memoryview, name: str, begin: int) -> None:
        """Fills `buffer` with the bytes of a tensor from byte `begin` on. Several threads may call it at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class ModelFolder(TensorFolder):
    """A model of the family that this project tunes."""

    arch: Arch

    @property
    def carried(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that pass as they are: those of multi-token prediction."""
        return {name: entry.shape for name, entry in self.layout.entries.items() if name.startswith(MTP)}


class RowFolder(ModelFolder):
    """A model that has whole rows to give."""

    @abstractmethod
    def fill_rows(self, buffer: memoryview, name: str, start: int) -> None:
        """Fills `buffer` with rows `start` and following, as many as it has room for."""

    def read_into(self, buffer: memoryview, name: str, begin: int) -> None:
        """As `TensorFolder` has it; where `begin` or the end is amid a row, through memory for the whole rows."""
        row = self.layout.entries[name].row_bytes
        start, skip = divmod(begin, row)
        if not skip and len(buffer) % row == 0:
            return self.fill_rows(buffer, name, start)
        whole = memoryview(bytearray(-(-(skip + len(buffer)) // row) * row))
        self.fill_rows(whole, name, start)
        buffer[:] = whole[skip : skip + len(buffer)]
        return None


class SafetensorsFolder(TensorFolder):
    """Tensors in safetensors files beside config.json, checked when it is opened; their names are not.

    `quantized` ones may have FP8 tensors. A folder of ours must be what was written (`nano3.sealed_folder`), unless
    `as_is`: for who names every difference in it. Raises `UserError`, before anything is read, for a missing folder or
    shard, a truncated file, and an index that does not fit.
    """

    def __init__(self, path: Path | str, quantized: bool = False, as_is: bool = False) -> None:
        self.path = self.side = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a folder; give a Hugging Face model folder")
        if not as_is:
            check_seal(self.path)
        self.config = read_config(self.path)
        self._check_config(quantized)
        self.layout = FileLayout.read(self.path, quantized)
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def _check_config(self, quantized: bool) -> None:
        """Refuses a config.json before any tensor is looked for."""

    def read_into(self, buffer: memoryview, name: str, begin: int) -> None:
        """Fills `buffer` with the bytes of a tensor from byte `begin` on. Several threads may call it at once."""
        entry = self.layout.entries[name]
        with self._lock:
            if entry.file not in self._files:
                self._files[entry.file] = os.open(self.path / entry.file, os.O_RDONLY)
        if not read_exactly(self._files[entry.file], buffer, entry.start + begin):
            raise UserError(f"{self.path / entry.file} ended while {name} was read; it changed under our hands")

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


class HFFolder(SafetensorsFolder, ModelFolder):
    """A Hugging Face model folder that holds exactly the tensors of its config.json. Use as a context manager.

    `quantized` ones may have, beyond the model's own, tensors named `..._scale`.

    Raises `UserError`, before anything is read, as `SafetensorsFolder` does, for a config that we do not support, and
    for missing, unknown or misshapen tensors, by name.
    """

    def __init__(self, path: Path | str, quantized: bool = False, as_is: bool = False) -> None:
        super().__init__(path, quantized, as_is)
        shapes = {name: entry.shape for name, entry in self.layout.entries.items()}
        if quantized:
            shapes = {name: shape for name, shape in shapes.items() if not name.endswith("_scale")}
        own = {name: spec.shape for name, spec in self.arch.tensors().items()}
        check_tensors(str(self.path), shapes, own | _carried(self.arch, shapes, self.path))

    def _check_config(self, quantized: bool) -> None:
        self.quantization = self.config.pop("quantization_config", None) if quantized else None
        self.arch = Arch.from_config(self.config, str(self.path))


def _carried(arch: Arch, found: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of multi-token prediction among those `found`, none where config.json has no such heads.

    Raises `UserError` where it has some and there are no tensors.
    """
    if not arch.num_nextn_predict_layers:
        return {}
    carried = {name: shape for name, shape in found.items() if name.startswith(MTP)}
    if not carried:
        raise UserError(
            f"{where}: config.json has num_nextn_predict_layers {arch.num_nextn_predict_layers}, and there is no "
            f"tensor {MTP}*, as transformers saves it; get the published folder, or set the field to 0 to go without"
        )
    return carried


def _is_weights(relative: Path) -> bool:
    """Weights in any form, what describes and vouches for them, our marker and card; a stale copy must not travel."""
    name = relative.name
    return name.endswith(WEIGHT_ENDS) or name in (
        CARD,
        CERTIFICATE,
        FP8_ACTIVATIONS,
        INDEX,
        MARKER,
        SEAL,
        SIGNATURE,
    )


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
        stored = {key.removeprefix(PREFIX): shape for key, shape in self.reader.shapes.items()}
        carried = _carried(self.arch, stored, path)
        self.tensors = [*megatron_tensors(self.arch), *carried_tensors(carried)]
        _check_weights(self.reader, self.tensors)
        self._places = _places(self.tensors)
        dtypes = {block.name: self.reader.dtype(PREFIX + t.key) for t in self.tensors for block in t.blocks}
        shapes = {name: spec.shape for name, spec in self.arch.tensors().items()} | carried
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


def open_tensors(path: Path, quantized: bool = False, as_is: bool = False) -> TensorFolder:
    """The same of a model that is tuned in plain transformers too (`nano3.hf_config.is_plain`)."""
    return SafetensorsFolder(path, as_is=as_is) if is_plain(path) else open_model(path, quantized, as_is)


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
        layout = FileLayout.from_json(read_bytes(source / LAYOUT, "copy the checkpoint again"), str(source / LAYOUT))
        if layout.fits(table):
            return layout
    return FileLayout.make(table)
