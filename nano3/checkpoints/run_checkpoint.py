"""Checkpoints of a run and going on from them, bit for bit.

    OUT/checkpoints/step-000400/
        lora.json, weights/    the adapter after 400 steps: conversion/merge_lora.py takes the folder as it is
        training/optimizer/    Adam's moments and FP32 masters, by parameter (torch_dist)
        training/run.pt        Adam's step, schedule, callbacks' states
        training/ranks.pt      random numbers, rank by rank
        training/state.json    step, samples, the identity of the run, and the layout of its ranks
        files.json             every file's size

Nothing of the base is in it and, but for `ranks.pt`, nothing of the layout: ranks of another one go on too. It is
written aside and renamed, between two steps: after the validation of the step before, before anything of the next.
"""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from typing_extensions import TypedDict

from nano3.checkpoints import checkpoint_folder as folders
from nano3.checkpoints.adapter_checkpoint import (
    adapter_facts,
    adapter_state,
    finish,
    load_adapter,
    shared_output,
    write_adapter,
    write_sharded,
)
from nano3.checkpoints.replicas import require_equal_replicas
from nano3.checkpoints.training_state import (
    adam_step,
    load_optimizer,
    new_random_state,
    optimizer_tensors,
    random_state,
    schedules,
    set_adam_step,
    set_random_state,
    set_schedules,
)
from nano3.documents import Count, Name, check
from nano3.file_system import free_disk
from nano3.pickles import REMEDY, load_state
from nano3.router import require_router

SPARE_BYTES = 4 << 20
"""Of a checkpoint beside its tensors: headers, random numbers, JSON."""


class Schedule(TypedDict):
    """State of a learning rate's schedule (`nano3.training.rates.GroupRates`)."""

    step: Count


class RunState(TypedDict):
    """run.pt. Each callback holds its own state to a schema."""

    adam_step: Count
    schedules: list[Schedule]
    callbacks: dict[Name, dict[str, Any]]


class RunCheckpoints(pl.Callback):
    """Writes checkpoints at a cadence, and goes on from the newest one. Makes itself the first callback of the trainer.

    Being first, its `on_fit_start` gives the other callbacks their states before any of them starts, and its
    `on_train_batch_start` sees every step complete: validation, stopping and all other callbacks are through with it.

    Args:
        out: the run's folder.
        every: steps between checkpoints; 0: none by steps.
        minutes: wall-clock minutes between checkpoints, by rank 0's clock; 0: none by time.
        keep: how many checkpoints stay.
        identity: what makes it the same run; a checkpoint with another identity is refused.
        layout: number of ranks and sizes of their groups; ranks of another layout than the checkpoint's get the same
            state and the same data, but random numbers of their own.
        seed: of the run.
    """

    def __init__(
        self,
        out: str,
        every: int,
        minutes: float,
        keep: int,
        identity: dict[str, Any],
        layout: dict[str, int],
        seed: int,
    ) -> None:
        self.out, self.every, self.minutes, self.keep = Path(out), every, minutes, keep
        self.identity, self.layout, self.seed = identity, layout, seed
        self.source: Path | None = None
        self._saved: dict[str, Any] | None = None
        self._resumed_step = self._last_step = 0
        self._last_time = 0.0
        self._terminated = False

    # Going on

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the newest checkpoint and sets the data's position, before the loaders are made."""
        del pl_module, stage
        # A new list: Lightning is going through the old one.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            found = [folders.newest(self.out)]
            folders.prune(self.out, self.keep)  # what an attempt that was killed while pruning left
        dist.broadcast_object_list(found, src=0)
        self.source = found[0]
        if self.source is None:
            return
        folders.refuse_other_run(self.source, self.identity)
        state = folders.read_state(self.source)
        self._resumed_step = self._last_step = state["step"]
        sampler = trainer.datamodule.data_sampler  # type: ignore[attr-defined]
        sampler.init_consumed_samples = sampler.prev_consumed_samples = state["samples"]
        sampler.init_global_step = state["step"]
        path = self.source / folders.TRAINING / "run.pt"
        self._saved = {**check(_read(self.source, path.name), RunState, str(path), REMEDY), **state}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets Lightning's counters and the other callbacks' states."""
        del pl_module
        if self._saved is None:
            return
        _set_counters(trainer, self._resumed_step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in self._saved["callbacks"]:
                callback.load_state_dict(self._saved["callbacks"][callback.state_key])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del trainer, pl_module
        self._last_time = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # In place of Lightning's handler, which ends each rank at a step of its own and leaves the others waiting.
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._terminated = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Restores before the first step, when adapters and optimizer exist at last; saves between steps when due."""
        if self._saved is not None:
            self._restore(trainer, pl_module, self._saved)
            self._saved = None
            return
        step = trainer.global_step
        due, ending = self._decide(step)
        if due and step > self._last_step:
            self.save(trainer, pl_module)
        if ending:
            if trainer.is_global_zero:
                print(f"SIGTERM: ended after step {step}; the same command resumes from there", flush=True)
            raise SIGTERMException

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, saved: dict[str, Any]) -> None:
        assert self.source is not None
        load_adapter(pl_module, self.source)
        load_optimizer(trainer, adapter_state(pl_module), self.source / folders.TRAINING / "optimizer")
        set_schedules(trainer, saved["schedules"])
        set_adam_step(trainer, saved["adam_step"])
        # What an untouched run would have fetched, so that the last batch is known as such (and validated after).
        trainer.fit_loop._data_fetcher.fetched += self._resumed_step * _micro_batches(trainer)  # type: ignore[union-attr]
        if saved["layout"] == self.layout:
            ranks = _read(self.source, "ranks.pt")
            set_random_state(ranks[dist.get_rank()])
        else:
            new_random_state(self.seed, self._resumed_step)
        if trainer.is_global_zero:
            print(f"resumed at step {self._resumed_step} from {self.source}{self._moved(saved['layout'])}", flush=True)

    def _moved(self, layout: dict[str, int]) -> str:
        """What to know about going on from a checkpoint of another layout; empty for the same one."""
        if layout == self.layout:
            return ""
        there, here = folders.layout_in_words(layout), folders.layout_in_words(self.layout)
        return (
            f", written by {there}, on {here}: the same samples, but sums in another order, and random numbers (of "
            "dropout) that begin anew from train.seed and the step"
        )

    # Saving

    def _decide(self, step: int) -> tuple[bool, bool]:
        """Whether to save now and whether to end, the same on all ranks: rank 0's clock, anybody's SIGTERM."""
        late = self.minutes > 0 and time.monotonic() - self._last_time >= 60 * self.minutes
        ending = self._terminated
        flags = torch.tensor([float(late and dist.get_rank() == 0), float(ending)]).cuda()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        late, ending = (bool(flag) for flag in flags.tolist())
        return ending or late or (self.every > 0 and step % self.every == 0), ending

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the checkpoint of now, if routers and replicas are as they must be; all ranks must call it."""
        step = trainer.global_step
        target = folders.step_folder(self.out, step)
        require_router(trainer, pl_module)
        adapters = adapter_state(pl_module)
        optimizer = optimizer_tensors(trainer, adapters)
        require_equal_replicas({**adapters, **optimizer}, f"checkpoint after step {step}")
        needed = _require_space(target, {**adapters, **optimizer})
        run, ranks = self._run_state(trainer), _packed(_gathered(random_state()))
        with shared_output(target, needed) as folder:
            write_adapter(adapters, folder, adapter_facts(trainer))
            write_sharded(optimizer, folder / folders.TRAINING / "optimizer")
            if dist.get_rank() == 0:
                (folder / folders.TRAINING / "run.pt").write_bytes(run)
                (folder / folders.TRAINING / "ranks.pt").write_bytes(ranks)
                state = {"format": folders.FORMAT, "step": step, "samples": _samples(trainer), "layout": self.layout}
                text = json.dumps({**state, "identity": self.identity}, indent=1)
                (folder / folders.TRAINING / folders.STATE).write_text(text + "\n")
            finish(folder)
        if dist.get_rank() == 0:
            folders.prune(self.out, self.keep)
        self._last_step, self._last_time = step, time.monotonic()

    def _run_state(self, trainer: pl.Trainer) -> bytes:
        """`run.pt` on rank 0, whose callbacks speak for all; of no use elsewhere."""
        steps = {step for step in _gathered(adam_step(trainer)) if step is not None}
        assert len(steps) <= 1, f"ranks of one run have taken different numbers of steps: {steps}"
        callbacks = {
            callback.state_key: state
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if (state := callback.state_dict())
        }
        return _packed({"adam_step": max(steps, default=0), "schedules": schedules(trainer), "callbacks": callbacks})


def _gathered(mine: Any) -> list[Any]:
    """What every rank has, on rank 0; nothing elsewhere."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    return everyone or []


def _packed(state: Any) -> bytes:
    """A file's content for `load_state`; refuses at once what could not be read again without running code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    load_state(io.BytesIO(buffer.getvalue()), "the training's state")
    return buffer.getvalue()


def _read(checkpoint: Path, name: str) -> Any:
    path = checkpoint / folders.TRAINING / name
    return load_state(path, str(path))


def _set_counters(trainer: pl.Trainer, step: int) -> None:
    """Lightning's loop as it stands after `step` steps: `trainer.global_step`, and when to validate."""
    loop = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress.total
    batches.ready = batches.started = batches.processed = batches.completed = step  # type: ignore[attr-defined]
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = step
    loop.scheduler_progress.total.ready = loop.scheduler_progress.total.completed = step
    loop._batches_that_stepped = step


def _micro_batches(trainer: pl.Trainer) -> int:
    """Micro batches of a step on this rank."""
    return trainer.datamodule.data_sampler.num_microbatches  # type: ignore[attr-defined]


def _samples(trainer: pl.Trainer) -> int:
    """Packs that the steps so far have taken, over all ranks."""
    return trainer.global_step * trainer.datamodule.data_sampler.global_batch_size  # type: ignore[attr-defined]


def _require_space(target: Path, state: dict[str, Any]) -> int:
    """Refuses on all ranks, before anything is written, a checkpoint that the disk cannot take; returns its bytes."""
    needed = torch.tensor(sum(_bytes(entry) for entry in nested_values(state))).cuda()
    dist.all_reduce(needed)
    total = int(needed.item()) + SPARE_BYTES
    error: list[Any] = [None]
    if dist.get_rank() == 0 and free_disk(target)[1] < total:
        error = [folders.disk_full(target, total)]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
    return total


def _bytes(entry: Any) -> int:
    """Bytes that this rank writes of a sharded tensor: none, when another rank writes the replica."""
    return entry.data.numel() * entry.data.element_size() if is_main_replica(entry.replica_id) else 0
