"""Threads for work on tensors: reading, hashing, arithmetic and writing all release the interpreter's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

T = TypeVar("T")

MOST = 8
"""Threads at most: each holds buffers of up to a chunk, and memory must not grow with the machine."""

_own = threading.local()


def workers() -> int:
    """One thread for each core that this process may use, at most `MOST`."""
    return max(1, min(MOST, len(os.sched_getaffinity(0))))


def in_parallel(tasks: Iterable[T], do: Callable[[T], Any]) -> None:
    """`do(task)` for every task, begun in their order. After an error no further one begins; the first is raised."""
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in as_completed([pool.submit(do, task) for task in tasks]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def scratch(size: int) -> memoryview:
    """`size` bytes that belong to this thread until its next call.

    Memory that is taken anew costs more than filling it: the kernel clears every page.
    """
    if len(getattr(_own, "buffer", b"")) < size:
        _own.buffer = bytearray(size)
    return memoryview(_own.buffer)[:size]
