"""What a run needs besides its adapter to go on as if nothing had happened: optimizer, schedule, random numbers.

The optimizer's tensors are stored by parameter, in the parameters' own global shapes, like the adapter; its step and
the schedule's are one number each. So nothing depends on how ranks shared the model, but for the random numbers: those
are every rank's own, and ranks of another layout start new ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from nano3.checkpoint_metadata import load_sharded
from nano3.lora.dropout import seed_dropout

Tensors = dict[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


class WholeState:
    """FP32: the optimizer holds the moments of whole parameters, on every data-parallel rank the same."""

    def __init__(self, optimizer: FP32Optimizer) -> None:
        self.inner = optimizer.optimizer

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for group in self.inner.param_groups:
            yield from group["params"]

    def read(self, parameter: torch.nn.Parameter) -> Tensors:
        """The parameter's moments, in its shape."""
        return {name: self.inner.state[parameter][name] for name in MOMENTS}

    def write(self, parameter: torch.nn.Parameter, tensors: Tensors) -> None:
        self.inner.state[parameter].update({name: tensors[name].to(parameter.device) for name in MOMENTS})

    def fresh(self, parameter: torch.nn.Parameter) -> Tensors:
        """What `write` wants, in host memory, to load into; already right where the checkpoint has nothing: rows that
        pad the vocabulary in this layout only."""
        return {name: torch.zeros_like(parameter.detach(), device="cpu") for name in MOMENTS}

    def holders(self) -> Iterator[torch.Tensor]:
        """The keys of the inner optimizer's state."""
        yield from self.parameters()


class SlicedState:
    """The distributed optimizer: moments and FP32 masters, each data-parallel rank with a slice of some parameters."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        assert not optimizer.config.use_precision_aware_optimizer, "its states are not FP32"
        self.optimizer, self.inner = optimizer, optimizer.optimizer

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for buffer in self.optimizer.buffers:
            yield from buffer.params

    def _mine(self, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, slice] | None:
        """This rank's master of the parameter, flat, and which part of the parameter it is; None without a part."""
        if parameter not in self.optimizer.model_param_gbuf_map:
            return None
        group, place = self.optimizer.model_param_group_index_map[parameter]
        part = self.optimizer._get_model_param_range_map(parameter)["param"]
        return self.inner.param_groups[group]["params"][place], slice(part.start, part.end)

    def read(self, parameter: torch.nn.Parameter) -> Tensors:
        """The parameter's moments and master from all data-parallel ranks, which must all call it; in host memory.

        Slices are put together by a sum of integers, so that not even the sign of a zero is lost.
        """
        mine, whole = self._mine(parameter), self.fresh(parameter)
        for name, tensor in whole.items():
            flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if mine is not None:
                main, part = mine
                flat[part] = (main if name == "param" else self.inner.state[main][name]).detach().view(-1)
            dist.all_reduce(flat.view(torch.int32), group=self.optimizer.data_parallel_group)
            tensor.copy_(flat.view_as(tensor))
        return whole

    def write(self, parameter: torch.nn.Parameter, tensors: Tensors) -> None:
        mine = self._mine(parameter)
        if mine is not None:
            main, part = mine
            main.data.copy_(tensors["param"].view(-1)[part].view_as(main))
            state = self.inner.state[main]
            slices = {name: tensors[name].view(-1)[part].view_as(main) for name in MOMENTS}
            state.update({name: value.to(main.device, copy=True) for name, value in slices.items()})

    def fresh(self, parameter: torch.nn.Parameter) -> Tensors:
        """FP32 tensors in host memory, in the parameter's shape, to read or load into; see `WholeState.fresh`."""
        param = parameter.detach().to("cpu", torch.float32, copy=True)
        return {"param": param, **{name: torch.zeros_like(param) for name in MOMENTS}}

    def holders(self) -> Iterator[torch.Tensor]:
        """The keys of the inner optimizer's state: the masters."""
        for group in self.inner.param_groups:
            yield from group["params"]


State = WholeState | SlicedState


def optimizer_states(trainer: pl.Trainer) -> list[State]:
    """The optimizers behind NeMo's wrapper, with a way to read and write whole parameters' state."""
    (wrapper,) = trainer.optimizers
    outer = wrapper.mcore_optimizer  # type: ignore[attr-defined]
    states: list[State] = []
    for optimizer in getattr(outer, "chained_optimizers", [outer]):
        if getattr(optimizer, "is_stub_optimizer", False):  # no trainable parameter of its kind on this rank
            continue
        if isinstance(optimizer, DistributedOptimizer):
            states.append(SlicedState(optimizer))
        elif isinstance(optimizer, FP32Optimizer):
            states.append(WholeState(optimizer))
        else:
            raise TypeError(f"checkpoints know no {type(optimizer).__name__}")
    return states


def _sharded(trainer: pl.Trainer, adapters: dict[str, Any], load: bool) -> tuple[dict[str, Any], list[Any]]:
    """Sharded tensors of the optimizer by `KIND.KEY` of the adapter's, and of each parameter (state, itself, keys)."""
    keys = {id(entry.data): key for key, entry in adapters.items()}
    sharded: dict[str, Any] = {}
    owners = []
    for state in optimizer_states(trainer):
        for parameter in state.parameters():
            assert id(parameter) in keys, f"a trainable parameter of shape {tuple(parameter.shape)} is in no adapter"
            key = keys[id(parameter)]
            tensors = state.fresh(parameter) if load else state.read(parameter)
            for kind, tensor in tensors.items():
                sharded[f"{kind}.{key}"] = make_sharded_optimizer_tensor(adapters[key], tensor, f"optimizer.{kind}")
            owners.append((state, parameter, {kind: f"{kind}.{key}" for kind in tensors}))
    return sharded, owners


def optimizer_tensors(trainer: pl.Trainer, adapters: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's tensors as sharded tensors, `adapters` being the adapter's; all ranks must call it."""
    return _sharded(trainer, adapters, load=False)[0]


@torch.no_grad()
def load_optimizer(trainer: pl.Trainer, adapters: dict[str, Any], folder: Path) -> None:
    """Fills moments and masters from the folder that `optimizer_tensors` was written to."""
    sharded, owners = _sharded(trainer, adapters, load=True)
    loaded = load_sharded(sharded, folder)
    for state, parameter, keys in owners:
        state.write(parameter, {kind: loaded[key] for kind, key in keys.items()})


def adam_step(trainer: pl.Trainer) -> int | None:
    """Steps that Adam has taken; None on a rank without a part of the optimizer.

    torch's counts by parameter, Transformer Engine's fused one by group; all parameters of a run take all steps.
    """
    steps = {
        int(counter["step"])
        for state in optimizer_states(trainer)
        for counter in (*state.inner.param_groups, *(state.inner.state[holder] for holder in state.holders()))
        if "step" in counter
    }
    assert len(steps) <= 1, f"parameters of one run with different numbers of steps: {steps}"
    return steps.pop() if steps else None


def set_adam_step(trainer: pl.Trainer, step: int) -> None:
    """The inverse of `adam_step`, for either optimizer."""
    for state in optimizer_states(trainer):
        if isinstance(state.inner, torch.optim.Adam):  # AdamW is one
            for holder in state.holders():
                state.inner.state[holder]["step"] = torch.tensor(float(step))
        else:
            for group in state.inner.param_groups:
                group["step"] = step


def schedules(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """The states of the learning rates' schedules."""
    return [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]


def set_schedules(trainer: pl.Trainer, saved: list[dict[str, Any]]) -> None:
    """The inverse of `schedules`."""
    for config, values in zip(trainer.lr_scheduler_configs, saved, strict=True):
        config.scheduler.load_state_dict(values)


def random_state() -> dict[str, Any]:
    """Of Python, NumPy, PyTorch (CPU and this rank's device) and Megatron-Core's tracker."""
    name, keys, *rest = cast(tuple, np.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def set_random_state(saved: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    random.setstate(saved["python"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    torch.cuda.set_rng_state(saved["device"])
    get_cuda_rng_tracker().set_states(saved["megatron"])


def new_random_state(seed: int, step: int) -> None:
    """Random numbers for ranks of another layout than the checkpoint's: a function of `seed`, `step` and the layout.

    Megatron-Core makes of one seed those of all its generators, which agree between ranks where they must
    (`nano3/lora/dropout.py`).
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    mixed = int.from_bytes(digest[:4], "little") >> 1
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    seed_dropout(mixed)
