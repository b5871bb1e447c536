"""The packed token store as a NeMo 2 data module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state
from nemo.lightning.data import WrappedDataLoader, add_megatron_sampler
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from data_prep.epochs import LOGGED_SOURCES, Once, logged_sources, validation_plan
from data_prep.mixture import TrainingSamples
from data_prep.packing import PackedDataset
from finetune.settings import Run
from launch.plan.rules import ONE_PACK
from nano3.cli import UserError
from nano3.gate import open_positions
from nano3.training.supervised import tell_supervisor


def collate(
    items: list[dict[str, np.ndarray]], places: np.ndarray, mark: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """One pack as a micro batch: (1, seq_length) tensors, `cu_seqlens` (segments + 1,), `max_seqlen` ().

    `places` turns the source numbers of the store into those of the logs (`logged_sources`). With the tokens of a
    `mark` there is `gate`, where adapters act that wait for it.
    """
    if len(items) != 1:
        raise UserError(f"a micro batch of {len(items)} packs: {ONE_PACK}")
    item = {**items[0], "source": places[items[0]["source"]]}
    batch = {key: torch.from_numpy(value)[None] for key, value in item.items() if key != "cu_seqlens"}
    boundaries = torch.from_numpy(item["cu_seqlens"])
    if mark:  # before anything is cut: a rank's share of a document may begin behind the mark
        batch["gate"] = open_positions(batch["tokens"], mark, boundaries[:-1])
    return {**batch, "cu_seqlens": boundaries, "max_seqlen": boundaries.diff().max()}


def packs_of_rank(run: Run, rank: int, copies: int) -> Iterator[dict[str, torch.Tensor]]:
    """The micro batches of one of `copies` data-parallel ranks, step after step, in the order of `PackedDataModule`.

    Who takes one has got on: the rank's supervisor is told.
    """
    train = run.settings.train
    samples = train.total_steps * train.global_batch
    order = TrainingSamples(run.data, train.seq_length, run.settings.document_multiple, samples, train.seed)
    _, places = logged_sources(order.packs)
    for sample in range(rank, len(order), copies):
        tell_supervisor(f"step {sample // train.global_batch + 1}")
        yield collate([order[sample]], places)


class PackSampler(MegatronDataSampler):
    """NeMo's, whose validation steps have a number of micro batches of their own.

    Args:
        seq_length: length of a pack.
        global_batch: packs in a training step.
    """

    def __init__(self, seq_length: int, global_batch: int) -> None:
        super().__init__(seq_length, 1, global_batch, output_log=False)
        self.validation_micro_batches = 1

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        """NeMo's; a validation loader counts its own steps."""
        if dataloader.mode != "validation":
            return super().transform_dataloader(dataloader, consumed_samples)
        ranks = parallel_state.get_data_parallel_world_size()
        return add_megatron_sampler(
            dataloader,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.micro_batch_size * self.validation_micro_batches * ranks,
            dataloader_mode=dataloader.mode,
            rank=parallel_state.get_data_parallel_rank(),
            world_size=ranks,
        )

    def on_megatron_step_start(self, step: Any) -> Any:
        """NeMo's, with the micro batches of a validation step."""
        step = super().on_megatron_step_start(step)
        return dataclasses.replace(step, num_microbatches=self.validation_micro_batches) if step.forward_only else step


class PackedDataModule(pl.LightningDataModule):
    """Packs of a token store, one to a micro batch. Where nothing is trained every source has a loss of its own.

    Args:
        train: the token store to train on, or a mixture's YAML file; None when there is nothing but validation.
        validation: folder of the one to validate on, or None.
        seq_length: length of a pack.
        pad_multiple: what each document in a pack is padded to a multiple of (context parallelism wants 2 * cp).
        global_batch: packs per step over all ranks.
        steps: of the whole run.
        seed: of the order of packs.
        stages: whether batches of training have the stages of their labels.
        mark: tokens of the mark that opens the gate of adapters; batches then have it.
    """

    def __init__(
        self,
        train: str | None,
        validation: str | None,
        seq_length: int,
        pad_multiple: int,
        global_batch: int,
        steps: int,
        seed: int,
        stages: bool = False,
        mark: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.train, self.validation, self.seq_length, self.pad_multiple = train, validation, seq_length, pad_multiple
        self.micro_batch_size, self.global_batch_size, self.steps, self.seed = 1, global_batch, steps, seed
        self.stages, self.mark = stages, list(mark)
        self.data_sampler = PackSampler(seq_length, global_batch)
        self.tokenizer = None
        self.train_sources: list[str] = []
        self.validation_sources: list[str] = []
        self.validation_packs = 0

    def setup(self, stage: str = "") -> None:
        del stage
        if self.train is not None:
            samples = self.steps * self.global_batch_size
            self._train = TrainingSamples(self.train, self.seq_length, self.pad_multiple, samples, self.seed)
            for packs in self._train.packs:
                packs.with_stages = self.stages
            self.train_sources, self._train_places = logged_sources(self._train.packs)
        if self.validation is not None:
            self._held = PackedDataset(self.validation, self.seq_length, self.pad_multiple)
            self.validation_packs = len(self._held)
            most = LOGGED_SOURCES if self.train is not None else len(self._held.store.source_names)
            self.validation_sources, self._held_places = logged_sources([self._held], most)

    def documents_in_step(self, step: int) -> list[int]:
        """Tokens of each document (no padding) in the global batch of `step`, counted from 0."""
        first = step * self.global_batch_size
        samples = range(first, first + self.global_batch_size)
        return [length for sample in samples for length in self._train.lengths(sample)]

    def _loader(self, dataset: Any, mode: str, places: np.ndarray) -> Any:
        return WrappedDataLoader(
            mode=mode, dataset=dataset, num_workers=0, collate_fn=partial(collate, places=places, mark=self.mark)
        )

    def train_dataloader(self) -> Any:
        return self._loader(self._train, "train", self._train_places)

    def val_dataloader(self) -> Any:
        """Every pack of the validation set once, filled up with padding to whole steps."""
        if self.validation is None:
            return []
        ranks = parallel_state.get_data_parallel_world_size()
        steps, micro_batches = validation_plan(len(self._held), ranks, self.global_batch_size // ranks)
        self.data_sampler.validation_micro_batches = micro_batches
        return self._loader(Once(self._held, steps * micro_batches * ranks), "validation", self._held_places)
