"""What a run needs besides its adapter to go on as if nothing had happened: optimizer, schedule, random numbers.

The optimizer's tensors are stored by parameter, in the parameters' own global shapes, like the adapter: nothing in the
files depends on how ranks shared them. Everything else is small and stored rank by rank.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

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

    def empty(self, parameter: torch.nn.Parameter) -> Tensors:
        """Tensors in host memory of what `write` wants, to load into."""
        return {name: torch.empty_like(parameter.detach(), device="cpu") for name in MOMENTS}

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
        mine, whole = self._mine(parameter), self.empty(parameter)
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

    def empty(self, parameter: torch.nn.Parameter) -> Tensors:
        """FP32 tensors in host memory, in the parameter's shape, to read or load into."""
        return {name: torch.empty(parameter.shape, dtype=torch.float32, device="cpu") for name in ("param", *MOMENTS)}

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
    """Sharded tensors of the optimizer by `KIND.KEY` of the adapter's, and each parameter's (state, itself, key)."""
    keys = {id(entry.data): key for key, entry in adapters.items()}
    sharded: dict[str, Any] = {}
    owners = []
    for state in optimizer_states(trainer):
        for parameter in state.parameters():
            assert id(parameter) in keys, f"a trainable parameter of shape {tuple(parameter.shape)} is in no adapter"
            key = keys[id(parameter)]
            for kind, tensor in (state.empty(parameter) if load else state.read(parameter)).items():
                sharded[f"{kind}.{key}"] = make_sharded_optimizer_tensor(adapters[key], tensor, f"optimizer.{kind}")
            owners.append((state, parameter, key))
    return sharded, owners


def optimizer_tensors(trainer: pl.Trainer, adapters: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's tensors as sharded tensors, `adapters` being the adapter's; all ranks must call it."""
    return _sharded(trainer, adapters, load=False)[0]


@torch.no_grad()
def load_optimizer(trainer: pl.Trainer, adapters: dict[str, Any], folder: Path) -> None:
    """Fills moments and masters from the folder that `optimizer_tensors` was written to."""
    sharded, owners = _sharded(trainer, adapters, load=True)
    loaded = dist_checkpointing.load(sharded, str(folder))
    for state, parameter, key in owners:
        state.write(parameter, {kind: loaded[f"{kind}.{key}"] for kind in state.empty(parameter)})


def own_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What only this rank knows: random numbers, the optimizer's groups and step, schedule, callbacks. Plain values."""
    (wrapper,) = trainer.optimizers
    return {
        "random": random_state(),
        "groups": [_plain(group) for group in wrapper.param_groups],
        "adam_steps": [_adam_step(state) for state in optimizer_states(trainer)],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }


def load_own_state(trainer: pl.Trainer, saved: dict[str, Any]) -> None:
    """The inverse of `own_state`, but for random numbers, which come last (`set_random_state`)."""
    (wrapper,) = trainer.optimizers
    for group, values in zip(wrapper.param_groups, saved["groups"], strict=True):
        group.update(values)
    for state, step in zip(optimizer_states(trainer), saved["adam_steps"], strict=True):
        _set_adam_step(state, step)
    for config, values in zip(trainer.lr_scheduler_configs, saved["schedules"], strict=True):
        config.scheduler.load_state_dict(values)


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers and flags of a parameter group: learning rate, weight decay, ..."""
    kinds = (bool, int, float, str, tuple, type(None))
    return {name: value for name, value in group.items() if isinstance(value, kinds)}


def _adam_step(state: State) -> float | None:
    """Steps that torch's Adam counts by parameter; None for fused ones, which count in the group (see `_plain`)."""
    steps = {
        float(state.inner.state[holder]["step"]) for holder in state.holders() if "step" in state.inner.state[holder]
    }
    assert len(steps) <= 1, f"parameters of one run with different numbers of steps: {steps}"
    return steps.pop() if steps else None


def _set_adam_step(state: State, step: float | None) -> None:
    if step is not None:
        for holder in state.holders():
            state.inner.state[holder]["step"] = torch.tensor(step)


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
