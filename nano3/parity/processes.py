"""Ranks as forked processes: the imports, which take longer than all the arithmetic, are made once for all layouts."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nano3 import cpu
from nano3.parity.case import Sizes
from nano3.parity.worker import rank_main

PATIENCE = 300.0
"""Seconds that a layout may take; a rank that waits for one that is gone never ends by itself."""


class RankFailed(RuntimeError):
    """A rank ended with an error; the message has its traceback."""


def on_ranks(sizes: Sizes, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(*arguments)` on every rank of a layout; their results in rank order.

    This process must not have used autograd or a process group: its forks would wait for threads that they lack.

    Raises:
        RankFailed: a rank raised, died or ran out of time; the others are ended.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if cpu.enabled():
        from nano3.cpu.compiled import load_compiler

        load_compiler()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_child, args=(work, folder, rank, sizes, arguments)) for rank in range(sizes.ranks)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, folder)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(sizes.ranks)]


def _wait(ranks: list[Any], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    if failed:
        messages = [path.read_text() for path in sorted(folder.glob("*.error"))]
        raise RankFailed(f"ranks {failed} of {len(ranks)} did not finish\n" + "\n".join(messages[:1]))


def _child(work: Callable[..., Any], folder: Path, rank: int, sizes: Sizes, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(sizes.ranks))
    try:
        rank_main(work, folder, rank, sizes.ranks, sizes, *arguments)
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)
