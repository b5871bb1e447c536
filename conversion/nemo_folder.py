"""A NeMo checkpoint read as if it were a Hugging Face folder: tensors by Hugging Face's names, a few rows at a time.

What reads either kind takes what `open_model` gives and asks for `arch`, `layout`, `dtypes`, `side` and `rows`.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.folders import LAYOUT, SIDE, WEIGHTS, progress
from conversion.identity import PIECE, Fact, RowDigests, hf_facts
from conversion.layout import Layout, TensorTable
from conversion.names import VOCABULARY_KEYS, MegatronTensor, RowBlock, megatron_tensors
from conversion.plan import PREFIX
from conversion.safetensors_io import HFFolder
from nano3.arch import Arch, is_nemo_checkpoint

if TYPE_CHECKING:
    import torch

    from conversion.torch_dist import TorchDistReader

THREADS = 2
"""Each holds a chunk of at most 256 MB twice while it reads it."""


class NemoFolder:
    """A NeMo checkpoint that holds exactly the tensors of `hf/config.json`. Use as a context manager.

    Raises `UserError`, before anything is read, for what `conversion/nemo_to_hf.py` refuses: missing, unknown or
    misshapen tensors, by name, and truncated files.
    """

    def __init__(self, path: Path | str, side: Path | None = None) -> None:
        from conversion.nemo_to_hf import check_weights
        from conversion.torch_dist import TorchDistReader

        self.path = Path(path)
        self.side = side or self.path / SIDE
        self.arch = Arch.load(self.side)
        reader = TorchDistReader(self.path / WEIGHTS)
        self._tensors = list(megatron_tensors(self.arch))
        check_weights(reader, self._tensors)
        self._stored = {key: reader.shapes[PREFIX + key] for key in VOCABULARY_KEYS}
        self._places = _places(self._tensors)
        self.dtypes = {block.name: reader.dtype(PREFIX + t.key) for t in self._tensors for block in t.blocks}
        shapes = {name: spec.shape for name, spec in self.arch.tensors().items()}
        self.layout = _layout(self.path, {name: (self.dtypes[name], shape) for name, shape in shapes.items()})
        self._local = threading.local()

    def rows(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows `start` to `start + count` of a tensor, in its dtype; threads may ask at once."""
        import torch

        parts = []
        for tensor, begin, block in self._places[name]:
            low, high = max(start, block.start), min(start + count, block.start + block.count)
            if low < high:
                offset, size = tensor.box(begin + low - block.start, high - low)
                rows = self._reader().read(PREFIX + tensor.key, offset, size)
                parts.append(rows.view(high - low, *tensor.row_shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def padding_problems(self) -> list[str]:
        """Vocabulary tensors whose rows behind the vocabulary are not zeros: nothing certifies what those hold."""
        problems = []
        for key, shape in self._stored.items():
            begin, count = self.arch.vocab_size, shape[0] - self.arch.vocab_size
            if count and self._reader().read(PREFIX + key, (begin, 0), (count, shape[1])).any():
                problems.append(f"{self.path}: {key} has values behind the {begin} rows of its vocabulary")
        return problems

    def _reader(self) -> TorchDistReader:
        """This thread's reader: each keeps the chunk that it read last."""
        from conversion.torch_dist import TorchDistReader

        if not hasattr(self._local, "reader"):
            self._local.reader = TorchDistReader(self.path / WEIGHTS)
        return self._local.reader

    def __enter__(self) -> NemoFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._local = threading.local()


def open_model(path: Path, quantized: bool = False) -> HFFolder | NemoFolder:
    """The model in a folder, Hugging Face's or NeMo's. `quantized`: FP8 is read too. Raises `UserError`."""
    return NemoFolder(path) if is_nemo_checkpoint(path) else HFFolder(path, quantized)


def model_facts(model: HFFolder | NemoFolder) -> dict[str, Fact]:
    """The facts of all tensors of a model, in one streaming pass with a progress bar on stderr."""
    if isinstance(model, HFFolder):
        return hf_facts(model)
    entries = model.layout.entries
    digests = RowDigests({name: (entry.dtype, entry.shape) for name, entry in entries.items()})
    with progress(sum(e.stop - e.start for e in entries.values()), "hash") as bar:

        def one(name: str) -> None:
            entry = entries[name]
            step = max(1, PIECE // entry.row_bytes)
            for start in range(0, entry.rows, step):
                rows = model.rows(name, start, min(step, entry.rows - start))
                digests.update(name, start, rows)
                bar.update(rows.nbytes)

        with ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(one, entries):
                pass
    return digests.facts()


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
