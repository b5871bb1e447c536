"""The packed token store as a NeMo 2 data module."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from data_prep.epochs import Epochs
from data_prep.packing import PackedDataset


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """One pack as a micro batch: (1, seq_length) tensors, `cu_seqlens` (segments + 1,), `max_seqlen` ()."""
    (item,) = items
    batch = {key: torch.from_numpy(value)[None] for key, value in item.items() if key != "cu_seqlens"}
    boundaries = torch.from_numpy(item["cu_seqlens"])
    return {**batch, "cu_seqlens": boundaries, "max_seqlen": boundaries.diff().max()}


class PackedDataModule(pl.LightningDataModule):
    """Packs of a token store, one to a micro batch.

    Args:
        train: folder of the token store to train on.
        validation: folder of the one to validate on, or None.
        seq_length: length of a pack.
        pad_multiple: what each document in a pack is padded to a multiple of (context parallelism wants 2 * cp).
        global_batch: packs per step over all ranks.
        steps: of the whole run.
        seed: of the order of packs.
    """

    def __init__(
        self,
        train: str,
        validation: str | None,
        seq_length: int,
        pad_multiple: int,
        global_batch: int,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train, self.validation, self.seq_length, self.pad_multiple = train, validation, seq_length, pad_multiple
        self.micro_batch_size, self.global_batch_size, self.steps, self.seed = 1, global_batch, steps, seed
        self.data_sampler = MegatronDataSampler(
            seq_len=seq_length, micro_batch_size=1, global_batch_size=global_batch, output_log=False
        )
        self.tokenizer = None

    def setup(self, stage: str = "") -> None:
        del stage
        packs = PackedDataset(self.train, self.seq_length, self.pad_multiple)
        self._train = Epochs(packs, self.steps * self.global_batch_size, self.seed, shuffle=True)
        self._validation = None
        if self.validation is not None:
            held = PackedDataset(self.validation, self.seq_length, self.pad_multiple)
            whole = len(held) // self.global_batch_size * self.global_batch_size
            self._validation = Epochs(held, whole, self.seed, shuffle=False)

    def tokens_in_step(self, step: int) -> int:
        """Tokens of documents (no padding) in the global batch of `step`, counted from 0."""
        first = step * self.global_batch_size
        packs = self._train.packs
        offsets, total = packs.store.offsets, 0
        for sample in range(first, first + self.global_batch_size):
            documents = packs.documents(self._train.pack_of(sample))
            total += int((offsets[documents + 1] - offsets[documents] - 1).sum())
        return total

    def _loader(self, dataset: Epochs, mode: str) -> Any:
        return WrappedDataLoader(mode=mode, dataset=dataset, num_workers=0, collate_fn=collate)

    def train_dataloader(self) -> Any:
        return self._loader(self._train, "train")

    def val_dataloader(self) -> Any:
        return self._loader(self._validation, "validation") if self._validation else []
