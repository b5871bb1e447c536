"""How work on tensors is cut into pieces and spread over cores. Torch-free until threads start.

Reading, hashing, arithmetic and writing all release the interpreter's lock, so threads serve.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

T = TypeVar("T")

MOST = 8
"""Threads at most: each holds buffers of up to a chunk, and memory must not grow with the machine."""

CHUNK_BYTES = 64 << 20
"""Upper bound of a chunk, in bytes: what a thread holds in memory, and the least that other readers load."""

PIECE = 1 << 20
"""Bytes that are read, hashed and written in one go: small enough to stay in a core's cache meanwhile (with 16 MiB the
kernel takes 1.6 times as long to copy them, measured)."""

STEP_BYTES = 16 << 20
"""Bytes of a tensor, in the wider of its two dtypes, that arithmetic takes in one go."""

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


def row_steps(rows: int, row_bytes: int, limit: int | None = None) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of pieces of at most `limit` bytes (default `CHUNK_BYTES`), or of one larger row."""
    step = max(1, (limit or CHUNK_BYTES) // row_bytes)
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def read_exactly(file: int, buffer: memoryview, position: int) -> bool:
    """Fills `buffer` from `position` of an open file on; False when the file ends before."""
    while buffer:
        got = os.preadv(file, [buffer], position)
        if got == 0:
            return False
        buffer, position = buffer[got:], position + got
    return True


def write_all(file: int, data: memoryview, position: int) -> None:
    """Writes all of `data` at `position` of an open file."""
    while data:
        put = os.pwrite(file, data, position)
        data, position = data[put:], position + put
