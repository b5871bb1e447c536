"""Writes the parts of a store that are missing: in this process, or in several that draw the next shard each."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.documents import add_documents
from data_prep.job import VERSION, Job, ShardReader
from data_prep.own_template import TemplateCheck
from data_prep.part_folder import FORMAT, Work
from data_prep.store import StoreWriter, identity
from data_prep.summary import Finds, Turns
from data_prep.tokens import ChatTokenizer
from nano3.cli import UserError
from nano3.imports import uncollected
from nano3.store_parts import MARKER

_LOOK_S = 0.5
"""How often a parent looks whether its processes live."""


def write_parts(job: Job, work: Work, workers: int = 1, first: int = 0, step: int = 1) -> None:
    """Writes the parts `first`, `first + step`, ... that are missing, with a progress bar.

    Raises:
        UserError: a row cannot be used, an input changed meanwhile, or a process was killed. Parts that are finished
            stay.
    """
    with tqdm(desc=work.out.name, unit="row", disable=None) as bar:
        if workers == 1:
            _write(job, work, count(first, step), bar.update)
        else:
            _in_processes(job, work, workers, (first, step), bar.update)


def _write(job: Job, work: Work, numbers: Iterator[int], report: Callable[[int], Any]) -> None:
    """Writes the missing parts of ascending `numbers`, until the input ends."""
    files = job.identity()["inputs"]
    writer: PartWriter | None = None
    for number in work.missing(numbers):
        writer = writer or PartWriter(job, work)
        if not writer.reader.begin(number):
            return
        writer.write(number, report)
        if job.reads_again and job.identity()["inputs"] != files:
            raise UserError(f"an input of {work.out} changed while it was read; run the same command again")
        if writer.reader.ended:
            return


class PartWriter:
    """What a process needs for all of its parts: the tokenizer is opened once, the inputs are read once."""

    def __init__(self, job: Job, work: Work) -> None:
        self.job, self.work = job, work
        self.reader = ShardReader(job.chats(), job.shard_rows)
        self.encoder = ChatTokenizer(job.tokenizer, job.options.backend)
        self.template = TemplateCheck(job.tokenizer, self.encoder.format)

    def write(self, number: int, report: Callable[[int], Any]) -> None:
        """Writes the part of the shard at whose start the reader is."""
        turns, finds, options = Turns(), Finds(), self.job.options
        with self.work.new_part(number) as folder, ExitStack() as stack, uncollected():
            writer = StoreWriter(folder, options.kept)
            stack.callback(writer.close)
            add_documents(
                self.reader.shard(), self.encoder, self.template, writer, turns, finds, options, report=report
            )
            for place in sorted(self.reader.touched):
                finds.take(place, self.reader.chats[place])
            ended = self.reader.ended
            marker = {
                "format": FORMAT,
                "version": VERSION,
                "last": ended,
                **writer.facts(),
                "tokenizer": identity(self.encoder) | self.encoder.backend_facts(),
                "template": self.template.facts(),
                "turns": vars(turns),
                "finds": vars(finds),
                "inputs": [fact for chat in self.reader.chats for fact in chat.facts] if ended else [],
            }
            (folder / MARKER).write_text(json.dumps(marker))


def _in_processes(job: Job, work: Work, workers: int, numbers: tuple[int, int], report: Callable[[int], Any]) -> None:
    """The same in processes of their own, which end with this one."""
    context = multiprocessing.get_context("spawn")
    drawn, reports = context.Value("q", 0), context.Queue()
    arguments = (job, work.out, drawn, numbers, reports)
    processes = [context.Process(target=_process, args=arguments, daemon=True) for _ in range(workers)]
    errors: list[str] = []
    try:
        for process in processes:
            process.start()
        while not errors and (any(process.is_alive() for process in processes) or not reports.empty()):
            try:
                kind, value = reports.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if kind == "error":
                errors.append(value)
            else:
                report(value)
    finally:
        for process in processes:
            if errors or process.is_alive():
                process.kill()
        for process in processes:
            process.join()
    if errors:
        raise UserError(errors[0])
    killed = [process.exitcode for process in processes if process.exitcode]
    if killed:
        raise OSError(
            f"a process that prepares {work.out} ended with {killed[0]} (-9: killed, as for memory); the same command "
            "resumes, with fewer --workers if memory was short"
        )


def _process(job: Job, out: Path, drawn: Any, numbers: tuple[int, int], reports: Any) -> None:
    """A worker: draws a number, writes its part, draws the next."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    first, step = numbers

    def draw() -> Iterator[int]:
        while True:
            with drawn.get_lock():
                number = first + step * drawn.value
                drawn.value += 1
            yield number

    try:
        _write(job, Work(out), draw(), lambda rows: reports.put(("rows", rows)))
    except UserError as error:
        reports.put(("error", str(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker was started by a process"
    connection.wait([parent.sentinel])
    os._exit(1)
