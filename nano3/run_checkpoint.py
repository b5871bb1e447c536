"""Checkpoints of a run and going on from them, bit for bit.

    OUT/checkpoints/step-000400/
        lora.json, weights/    the adapter after 400 steps: conversion/merge_lora.py takes the folder as it is
        training/optimizer/    Adam's moments and FP32 masters, by parameter (torch_dist)
        training/ranks.pt      random numbers, schedule, callbacks' states: rank by rank
        training/state.json    step, samples, and the identity of the run
        files.json             every file's size

Nothing of the base is in it. It is written aside and renamed, between two steps: after the validation of the step
before, before anything of the next.
"""

from __future__ import annotations

import io
import json
import shutil
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

from nano3 import checkpoint_folder as folders
from nano3.adapter_checkpoint import (
    adapter_facts,
    adapter_state,
    finish,
    load_adapter,
    shared_output,
    write_adapter,
    write_sharded,
)
from nano3.replicas import require_equal_replicas
from nano3.router import require_router
from nano3.training_state import (
    load_optimizer,
    load_own_state,
    optimizer_tensors,
    own_state,
    set_random_state,
)

SPARE_BYTES = 4 << 20
"""Of a checkpoint beside its tensors: headers, random numbers, JSON."""


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
    """

    def __init__(self, out: str, every: int, minutes: float, keep: int, identity: dict[str, Any]) -> None:
        self.out, self.every, self.minutes, self.keep = Path(out), every, minutes, keep
        self.identity = identity
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
        ranks = torch.load(self.source / folders.TRAINING / "ranks.pt", weights_only=True)
        self._saved = ranks[dist.get_rank()]

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
                print(f"SIGTERM: ended after step {step}; the same command goes on from there", flush=True)
            raise SIGTERMException

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, saved: dict[str, Any]) -> None:
        assert self.source is not None
        load_adapter(pl_module, self.source)
        load_optimizer(trainer, adapter_state(pl_module), self.source / folders.TRAINING / "optimizer")
        load_own_state(trainer, saved)
        # What an untouched run would have fetched, so that the last batch is known as such (and validated after).
        trainer.fit_loop._data_fetcher.fetched += self._resumed_step * _micro_batches(trainer)  # type: ignore[union-attr]
        set_random_state(saved["random"])
        if trainer.is_global_zero:
            print(f"resumed at step {self._resumed_step} from {self.source}", flush=True)

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
        states = self._states_of_all_ranks(trainer)
        with shared_output(target, needed) as folder:
            write_adapter(adapters, folder, adapter_facts(trainer))
            write_sharded(optimizer, folder / folders.TRAINING / "optimizer")
            if dist.get_rank() == 0:
                (folder / folders.TRAINING / "ranks.pt").write_bytes(states)
                state = {"step": step, "samples": _samples(trainer), "identity": self.identity}
                (folder / folders.TRAINING / folders.STATE).write_text(json.dumps(state, indent=1) + "\n")
            finish(folder)
        if dist.get_rank() == 0:
            folders.prune(self.out, self.keep)
        self._last_step, self._last_time = step, time.monotonic()

    def _states_of_all_ranks(self, trainer: pl.Trainer) -> bytes:
        """`ranks.pt` on rank 0, nothing elsewhere; refuses at once what could not be read again."""
        callbacks = {
            callback.state_key: state
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if (state := callback.state_dict())
        }
        mine = {**own_state(trainer), "callbacks": callbacks}
        everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone, dst=0)
        if everyone is None:
            return b""
        buffer = io.BytesIO()
        torch.save(everyone, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        return buffer.getvalue()


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
    if dist.get_rank() == 0:
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
        if shutil.disk_usage(parent).free < total:
            error = [folders.disk_full(target, total)]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
    return total


def _bytes(entry: Any) -> int:
    """Bytes that this rank writes of a sharded tensor: none, when another rank writes the replica."""
    return entry.data.numel() * entry.data.element_size() if is_main_replica(entry.replica_id) else 0
