"""What tests do to a run from inside, by the environment variable FAULT=KIND:STEP, several with commas between them.

Only ranks under test import it.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finetune import packed_data
from nano3 import model
from nano3.checkpoints import adapter_checkpoint, checkpoint_folder, run_checkpoint
from nano3.checkpoints.run_checkpoint import RunCheckpoints
from nano3.training.supervised import Supervision
from tests.helpers.tiny_run import digest_of


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def install() -> None:
    """Installs the faults that FAULT names, if any."""
    for fault in filter(None, os.environ.get("FAULT", "").split(",")):
        kind, _, step = fault.partition(":")
        FAULTS[kind](int(step))


def _after_step(step: int, action: Callable[[Any], None]) -> None:
    def on_train_batch_end(_self: Any, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == step:
            action(pl_module)

    RunCheckpoints.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]


def kill_after(step: int) -> None:
    """SIGKILL when the step has been taken, before it can be saved."""
    _after_step(step, lambda _: die())


def kill_in_validation(step: int) -> None:
    """SIGKILL in the first validation after this step or later."""

    def on_validation_batch_end(_self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= step:
            die()

    RunCheckpoints.on_validation_batch_end = on_validation_batch_end  # type: ignore[method-assign]


def kill_in_save(step: int) -> None:
    """SIGKILL in the first save at this step or later: the adapter is written, the optimizer half."""
    write = run_checkpoint.write_sharded

    def write_and_die(state: dict[str, Any], folder: Any) -> None:
        if _step_of(folder) >= step:
            write(dict(list(state.items())[: len(state) // 2]), folder)
            die()
        write(state, folder)

    run_checkpoint.write_sharded = write_and_die


def kill_in_pruning(step: int) -> None:
    """SIGKILL when the new checkpoint has its name and an old one is about to go."""
    prune = checkpoint_folder.prune

    def die_or_prune(out: Any, keep: int) -> None:
        if checkpoint_folder.step_of(checkpoint_folder.checkpoints(out)[-1]) >= step:
            die()
        prune(out, keep)

    checkpoint_folder.prune = die_or_prune


def terminate_one(step: int) -> None:
    """SIGTERM to rank 1 alone after the step: all ranks must end together."""
    _after_step(step, lambda _: dist.get_rank() == 1 and os.kill(os.getpid(), signal.SIGTERM))


def stop_one(step: int) -> None:
    """SIGSTOP to rank 2 after the step: it says nothing more, and all others wait for it."""
    _after_step(step, lambda _: dist.get_rank() == 2 and os.kill(os.getpid(), signal.SIGSTOP))


def delay_one(seconds: int) -> None:
    """Rank 1 works so many seconds longer in every step."""
    start = Supervision.on_train_batch_start

    def start_and_work(self: Supervision, trainer: Any, pl_module: Any, *rest: Any) -> None:
        start(self, trainer, pl_module, *rest)
        if dist.get_rank() == 1:
            time.sleep(seconds)

    Supervision.on_train_batch_start = start_and_work  # type: ignore[method-assign]


def terminate_in_save(step: int) -> None:
    """SIGTERM to rank 0 and its helper processes in the saves from this step on."""
    save = adapter_checkpoint.dist_checkpointing.save

    def save_and_terminate(state: dict[str, Any], folder: str, **settings: Any) -> None:
        if "checkpoints" in folder and _step_of(Path(folder)) >= step and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            for helper in multiprocessing.active_children():  # the group, but for the server that forks these ranks
                os.kill(helper.pid, signal.SIGTERM)  # type: ignore[arg-type]
        save(state, folder, **settings)

    adapter_checkpoint.dist_checkpointing.save = save_and_terminate


def _step_of(folder: Path) -> int:
    """The step of the unfinished checkpoint that `folder` lies in."""
    (number,) = re.findall(r"/\.step-(\d+)\.partial", str(folder))
    return int(number)


def perturb_replica(step: int) -> None:
    """One bit of one shared expert adapter changes on rank 1."""

    def action(model: Any) -> None:
        if dist.get_rank() == 1:
            named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
            value = next(value for name, value in named if ".mlp.experts." in name).data.view(-1)
            value[0] = torch.nextafter(value[0], torch.tensor(9.0))

    _after_step(step, action)


def nudge_router(step: int) -> None:
    """One router's correction bias moves by 1e-3 on all ranks, as Megatron-Core would move it."""

    def action(model: Any) -> None:
        next(bias for name, bias in model.named_buffers() if name.endswith("router.expert_bias"))[0] += 1e-3

    _after_step(step, action)


def nudge_router_weight(step: int) -> None:
    """One router's weight moves by 1e-3 on all ranks, as if it were not frozen."""

    def action(model: Any) -> None:
        named = model.named_parameters()
        next(weight for name, weight in named if name.endswith("router.weight")).data[0, 0] += 1e-3

    _after_step(step, action)


def fill_disk(step: int) -> None:
    """From this step on the kernel refuses to let a file grow beyond 30 kB, as on a full disk: adapters are larger."""
    _after_step(step, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))


def lose_a_number(step: int) -> None:
    """After this step one value of an adapter is NaN, on all ranks."""
    _after_step(
        step, lambda model: next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0].fill_(torch.nan)
    )


def run_out_of_memory(step: int) -> None:
    """After this step an allocation fails on all ranks."""

    def action(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    _after_step(step, action)


def save_again(_: int) -> None:
    """Writes what was just restored to OUT/again/checkpoints, before the first step."""
    restore = RunCheckpoints._restore

    def restore_and_save(self: RunCheckpoints, trainer: Any, pl_module: Any, saved: dict[str, Any]) -> None:
        restore(self, trainer, pl_module, saved)
        out, self.out = self.out, self.out / "again"
        self.save(trainer, pl_module)
        self.out = out

    RunCheckpoints._restore = restore_and_save  # type: ignore[method-assign]


def save_initial(_: int) -> None:
    """Writes the adapter that training starts from to OUT/initial, before the first step."""
    from nano3.training.initial_adapter import InitialAdapter

    start = InitialAdapter.on_train_batch_start

    def start_and_save(self: InitialAdapter, trainer: Any, pl_module: Any, *rest: Any) -> None:
        start(self, trainer, pl_module, *rest)
        if trainer.global_step == 0:
            out = trainer.callbacks[0].out
            adapter_checkpoint.save_adapter(pl_module, out / "initial", adapter_checkpoint.adapter_facts(trainer))

    InitialAdapter.on_train_batch_start = start_and_save  # type: ignore[method-assign]


def skip_samples(steps: int) -> None:
    """A run that goes on begins with the data of so many steps later."""
    setup = RunCheckpoints.setup

    def setup_and_skip(self: RunCheckpoints, trainer: Any, *rest: Any, **stage: Any) -> None:
        setup(self, trainer, *rest, **stage)
        sampler = trainer.datamodule.data_sampler
        sampler.init_consumed_samples += steps * sampler.global_batch_size

    RunCheckpoints.setup = setup_and_skip  # type: ignore[method-assign]


def record_packs(_: int) -> None:
    """Every training micro batch as the forward pass gets it: a line `process step digest` in OUT/packs-of-RANK."""
    take, start, now = model.packed_data_step, Supervision.on_train_batch_start, {}

    def start_and_note(self: Supervision, trainer: Any, pl_module: Any, *rest: Any) -> None:
        now["step"], now["out"] = trainer.global_step + 1, trainer.callbacks[0].out
        start(self, trainer, pl_module, *rest)

    def take_and_record(dataloader_iter: Iterator) -> Any:
        batch = take(dataloader_iter)
        if torch.is_grad_enabled():  # not in validation
            with (now["out"] / f"packs-of-{dist.get_rank()}").open("a") as file:
                file.write(f"{os.getpid()} {now['step']} {digest_of(batch)}\n")
        return batch

    Supervision.on_train_batch_start = start_and_note  # type: ignore[method-assign]
    model.packed_data_step = take_and_record


def read_by_workers(number: int) -> None:
    """So many processes of its own read the packs for each rank."""
    packed_data.WrappedDataLoader = partial(  # type: ignore[misc,assignment]
        _with_workers, packed_data.WrappedDataLoader, number
    )


def _with_workers(loader: Any, number: int, **arguments: Any) -> Any:
    return loader(**{**arguments, "num_workers": number})


FAULTS: dict[str, Callable[[int], None]] = {
    "kill": kill_after,
    "validation": kill_in_validation,
    "save": kill_in_save,
    "pruning": kill_in_pruning,
    "term": terminate_one,
    "stop": stop_one,
    "delay": delay_one,
    "term-in-save": terminate_in_save,
    "replica": perturb_replica,
    "router": nudge_router,
    "router-weight": nudge_router_weight,
    "disk": fill_disk,
    "nan": lose_a_number,
    "memory": run_out_of_memory,
    "again": save_again,
    "initial": save_initial,
    "skip": skip_samples,
    "record": record_packs,
    "workers": read_by_workers,
}
