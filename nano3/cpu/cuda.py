"""Answers CUDA requests on a machine without CUDA.

Megatron-Core and NeMo ask for the current CUDA device by name or index in some sixty places. Here the functions that
create or move tensors are wrapped once: a request for a CUDA device goes to the CPU (or, while `redirected_to("meta")`
is active, to the meta device). Wrapping functions instead of entering a `TorchFunctionMode` costs nothing on ordinary
operations, and it also holds inside `backward`, where PyTorch switches such a mode off.

CUDA's random generator is PyTorch's CPU generator: Megatron-Core's own tracker then forks and restores it, so dropout
and initialization differ or agree across ranks exactly as they do on GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "randperm",
    "linspace",
    "eye",
    "empty_strided",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
)
_NEW_FACTORIES = (
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_tensor",
)
_TENSOR_TYPES = (
    "FloatTensor",
    "HalfTensor",
    "BFloat16Tensor",
    "DoubleTensor",
    "LongTensor",
    "IntTensor",
    "ByteTensor",
    "BoolTensor",
)
_NO_EFFECT = (
    "synchronize",
    "set_device",
    "empty_cache",
    "ipc_collect",
    "reset_peak_memory_stats",
)
_ZERO = (
    "current_device",
    "memory_allocated",
    "memory_reserved",
    "max_memory_allocated",
    "max_memory_reserved",
    "utilization",
)

_target = "cpu"


@contextlib.contextmanager
def redirected_to(device: str) -> Iterator[None]:
    """Sends CUDA requests to `device` ("cpu" or "meta") meanwhile, for building a model without memory."""
    global _target
    previous, _target = _target, device
    try:
        yield
    finally:
        _target = previous


def is_cuda_request(device: Any) -> bool:
    """True for "cuda", "cuda:0", `torch.device("cuda")` and a bare index, as PyTorch takes an index for CUDA."""
    if isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _redirect_keyword(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_cuda_request(kwargs.get("device")):
            kwargs["device"] = _target
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapped


def _redirect_move(function: Callable) -> Callable:
    """For `Tensor.to` and `Module.to`: the device is the first positional argument or a keyword."""

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and is_cuda_request(args[0]):
            args = (_target, *args[1:])
        if is_cuda_request(kwargs.get("device")):
            kwargs["device"] = _target
        return function(self, *args, **kwargs)

    return wrapped


def _cuda_type_name(function: Callable) -> Callable:
    """`tensor.type()` names the CUDA class: Megatron-Core's bucketing compares it with `torch.cuda.FloatTensor`."""

    @functools.wraps(function)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return function(self, *args, **kwargs)
        return function(self).replace("torch.", "torch.cuda.")

    return wrapped


class _Stream:
    """A stream or event on a device without streams: everything has happened by the time it is asked."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_args: Any) -> float:
        return 0.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_args: Any) -> None:
        pass


def _answering(value: Any) -> Callable:
    """A new function that takes anything and returns `value`: torch.compile's tables want one object per name."""
    return lambda *_args, **_kwargs: value


def _itself() -> Callable:
    """A new method that returns its object, as a move to where it already is does."""
    return lambda self, *_args, **_kwargs: self


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    del device  # there is one generator
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    del device
    torch.set_rng_state(new_state)


class _SilenceSharedGenerator(logging.Filter):
    """Drops one warning of the tracker: that the CPU generator moved, which it must when it is the CUDA generator."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()


def install() -> None:
    """Wraps PyTorch's factories and moves and fills `torch.cuda`; idempotence is the caller's (`nano3.cpu.enable`)."""
    for name in _FACTORIES:
        setattr(torch, name, _redirect_keyword(getattr(torch, name)))
    for name in _NEW_FACTORIES:
        setattr(torch.Tensor, name, _redirect_keyword(getattr(torch.Tensor, name)))
    torch.Tensor.to = _redirect_move(torch.Tensor.to)  # type: ignore[method-assign]
    torch.nn.Module.to = _redirect_move(torch.nn.Module.to)  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign]
    torch.Tensor.cuda = _itself()  # type: ignore[method-assign]
    torch.nn.Module.cuda = _itself()  # type: ignore[method-assign]
    torch.Tensor.pin_memory = _itself()  # type: ignore[method-assign]
    torch.Tensor.record_stream = _answering(None)  # type: ignore[method-assign]
    for name in _TENSOR_TYPES:
        setattr(torch.cuda, name, getattr(torch, name))
    replaced: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_args: _Stream(),
        "default_stream": lambda *_args: _Stream(),
        "stream": lambda *_args: contextlib.nullcontext(),
        "device": lambda *_args: contextlib.nullcontext(),
        "default_generators": (torch.default_generator,),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        **{name: _answering(None) for name in _NO_EFFECT},
        **{name: _answering(0) for name in _ZERO},
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):  # it imported some of them by value
            setattr(torch.cuda.random, name, value)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_SilenceSharedGenerator())
