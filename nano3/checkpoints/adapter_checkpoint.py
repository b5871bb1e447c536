"""Writes and reads adapters: Megatron-Core's `torch_dist` with adapter tensors only, and `lora.json`."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.mamba import MambaModel
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from nano3.checkpoint_metadata import load_sharded
from nano3.checkpoints.base_identity import recorded_sha256
from nano3.checkpoints.checkpoint_folder import disk_full, sync
from nano3.checkpoints.replicas import require_equal_replicas
from nano3.outputs import fresh_output
from nano3.router import RouterGuard, balances, require_router
from nano3.sealed_folder import seal

KIND = "lora-adapter"
WEIGHTS = "weights"


def adapter_state(model: nn.Module) -> dict[str, Any]:
    """The sharded state of this rank's adapters, keys with the prefix `module.` and global layer numbers."""
    (core,) = [module for module in model.modules() if isinstance(module, MambaModel)]
    state = core.sharded_state_dict(prefix="module.")
    moving = (".mlp.router.expert_bias",) if balances(model) else ()
    return {key: value for key, value in state.items() if ".adapter." in key or key.endswith(moving)}


def save_adapter(model: nn.Module, out: Path, facts: dict[str, Any]) -> None:
    """Writes the adapter folder `out` from all ranks, whole or not at all; `facts` go to `lora.json`."""
    with shared_output(out) as folder:
        write_adapter(adapter_state(model), folder, facts)
        finish(folder)


def save_trained(trainer: pl.Trainer, model: nn.Module, out: Path, facts: dict[str, Any]) -> None:
    """`save_adapter` in a run: only if routers and replicas are as they must be."""
    require_router(trainer, model)
    require_equal_replicas(adapter_state(model), str(out))
    save_adapter(model, out, facts)


def write_adapter(state: dict[str, Any], folder: Path, facts: dict[str, Any]) -> None:
    """Writes `weights/` from all ranks and, on rank 0, `lora.json` into an existing folder."""
    write_sharded(state, folder / WEIGHTS)
    if dist.get_rank() == 0:
        (folder / "lora.json").write_text(json.dumps(facts, indent=1) + "\n")


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Fills this rank's adapters from an adapter folder, which may come from another parallel layout."""
    loaded = load_sharded(adapter_state(model), folder / WEIGHTS)
    for key, entry in adapter_state(model).items():
        entry.data.copy_(loaded[key])


def write_sharded(state: dict[str, Any], folder: Path) -> None:
    """Writes a sharded state from all ranks into the folder, which rank 0 creates."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    # One thread: with more, PyTorch's writer starts processes, which costs more than adapters are worth.
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    # Even so Megatron-Core has helper processes. A SIGTERM to the whole process group must not end them in the middle
    # of a save: they inherit that it is blocked; this process gets it when it is through. (Python's resource tracker
    # unblocks it when it starts, hence before.)
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def shared_output(out: Path, needed: int | None = None) -> Iterator[Path]:
    """`fresh_output` for all ranks: each gets the temporary folder that rank 0 made; leaving it is a barrier.

    `needed` bytes, if known, are named when the disk turns out to be full.
    """
    if dist.get_rank() > 0:
        name = [""]
        dist.broadcast_object_list(name, src=0)
        yield Path(name[0])
    else:
        with _full_disk_named(out, needed), fresh_output(out, KIND, grows=True) as temporary:
            dist.broadcast_object_list([str(temporary)], src=0)
            yield temporary
        sync(out)
    dist.barrier()


def finish(folder: Path) -> None:
    """When all ranks have written: rank 0 seals the folder and asks the disk to hold it."""
    dist.barrier()
    if dist.get_rank() == 0:
        seal(folder)
        sync(folder)


@contextmanager
def _full_disk_named(out: Path, needed: int | None) -> Iterator[None]:
    """Turns a write that failed for want of space, here or on another rank, into a `UserError`."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # PyTorch's is a BaseException
        words = f"{error!r} {error!s}"
        if any(text in words for text in ("No space left", "Disk quota exceeded", "File too large")) or (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ):
            raise disk_full(out, needed) from error
        raise


class SaveAdapter(pl.Callback):
    """Writes the adapter when training has ended.

    Args:
        out: the folder to write.
        facts: for `lora.json`: rank, alpha, dropout, targets, experts, modules, base_config.
        base: NeMo checkpoint with the base weights; its content hash goes to `lora.json`.
    """

    def __init__(self, out: str, facts: dict[str, Any], base: str) -> None:
        self.out, self.facts, self.base = out, facts, base

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        del trainer, pl_module, stage
        self.facts = {**self.facts, "base_sha256": recorded_sha256(Path(self.base))}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        save_trained(trainer, pl_module, Path(self.out), adapter_facts(trainer))


def adapter_facts(trainer: pl.Trainer) -> dict[str, Any]:
    """What `lora.json` says of the adapter as it is now: the recipe's facts, the step, the routers' hash."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    (saver,) = [callback for callback in callbacks if isinstance(callback, SaveAdapter)]
    guards = [callback for callback in callbacks if isinstance(callback, RouterGuard)]
    return {**saver.facts, "steps": trainer.global_step, "router_sha256": guards[0].digest if guards else None}
