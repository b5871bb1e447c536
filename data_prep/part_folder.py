"""The parts of a store while it is prepared, each written by itself.

    .NAME.unfinished/job.json        what decides the bytes: inputs, tokenizer, options, rows in a shard
    .NAME.unfinished/part-00003/     the arrays of shard 3, and part.json, written last
    .NAME.unfinished/store/          what is being joined (data_prep/join.py)
    .NAME.joined/                    the same folder when the store is there, until it is gone

A part is written under another name and renamed when it is whole: what has its name is finished. So whoever comes next
does the shards that are not there, on this host or another one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from data_prep.job import Job
from data_prep.summary import FindFacts, TurnFacts
from nano3.cli import UserError
from nano3.documents import AboveZero, Count, FileName, Name, Text, read_json
from nano3.file_system import locked, remove_folder, unique
from nano3.outputs import discard
from nano3.sealed_folder import MARKER as FOLDER_MARKER
from nano3.sealed_folder import is_ours, mark, owner_of
from nano3.store_parts import MARKER, PREPARE_AGAIN, finished_parts
from nano3.token_store import KIND, Counts, FileFacts, part_name, unfinished_folder

FORMAT = "token-part"
JOB = "job.json"
WORK = "unfinished-preparation"
"""Kind of the folder (`nano3.sealed_folder.mark`)."""


class Marker(Counts):
    """part.json. Each list counts within the part; `last` says that the input ends with it."""

    format: Literal["token-part"]
    version: Literal[1]
    last: bool
    longest_document: Count
    max_token_id: Count
    sources: dict[Name, Counts]
    weights: list[AboveZero]
    origins: list[Name]
    order: Name | None
    tokenizer: dict[Name, Any]
    template: dict[Name, Any]
    turns: TurnFacts
    finds: FindFacts
    inputs: list[dict[Name, Any]]
    files: dict[FileName, FileFacts]


class JobFile(TypedDict):
    """job.json, as far as the join reads it."""

    tokenizer_folder: Text
    thinking: bool
    no_loss: list[Name]


class Work:
    """The folder of a store's parts, beside its place `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.folder = unfinished_folder(out)
        self.joined = self.out.with_name(f".{self.out.name}.joined")
        """What `folder` is called when the store is there and the parts go."""

    def begin(self, job: Job) -> None:
        """Resumes from the parts of the same job; those of another one are thrown away.

        Raises:
            UserError: the folder is somebody else's, or another process writes parts.
        """
        content = job.file()
        if self.job() != content:
            self.remove()
        self.make()
        self.refuse_running()
        if self.job() is None:
            self._write_job(content)
            return
        print(f"resuming from {len(self.parts())} finished parts in {self.folder}", file=sys.stderr)
        for left in self.folder.glob("part-*.partial-*"):
            shutil.rmtree(left)

    def make(self) -> None:
        """Makes the folder, and makes it ours. Raises `UserError` where it is somebody else's."""
        # A version before markers had the job alone.
        if self.folder.exists() and not is_ours(self.folder, WORK) and not (self.folder / JOB).is_file():
            raise UserError(f"{self.folder} holds what no preparation left there; move it, or choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        mark(self.folder, WORK)

    def share(self, job: Job) -> None:
        """The same as `begin` where other processes may be writing parts: nothing is thrown away.

        Raises:
            UserError: the parts there are of another job.
        """
        content = job.file()
        if self.job() is None:
            self._write_job(content)
        if self.job() != content:
            raise UserError(
                f"{self.folder} has parts of other inputs or options; join or remove them, or choose another --out"
            )

    def refuse_running(self) -> None:
        """Raises `UserError` while another process writes parts for `--shard`."""
        for lock in self.folder.glob(".shard-*.lock"):
            with locked(lock) as free:
                if not free:
                    raise UserError(f"another process is writing parts ({lock.name}) of {self.out}; wait until it ends")

    def job(self) -> dict[str, Any] | None:
        """The content of job.json; None without one that can be read."""
        try:
            return read_json(self.folder / JOB, dict[str, Any])
        except UserError:
            return None

    def facts(self) -> JobFile:
        """What job.json says for the manifest. Raises `UserError` when it cannot be read."""
        return read_json(self.folder / JOB, JobFile, PREPARE_AGAIN)

    def _write_job(self, content: dict[str, Any]) -> None:
        """Whole; where the file system has links, not in the place of what another process wrote meanwhile."""
        new = self.folder / f"{JOB}.{unique()}"
        new.write_text(json.dumps(content))
        try:
            os.link(new, self.folder / JOB)
        except OSError:
            if self.job() is None:  # there are no links, or what is there is damaged
                os.replace(new, self.folder / JOB)
        new.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes all of it, at once for whoever looks: half of it must not be resumed from. Raises as `begin` does."""
        if self.folder.is_dir():
            self.make()
            self.refuse_running()
            discard(self.folder, self.out)
        self.clear_joined()

    def finish(self) -> None:
        """Removes the parts of a store that has its name. Until they are gone, `was_joined` knows it."""
        self.clear_joined()
        if self.joined.exists():  # somebody's, or what cannot be removed
            discard(self.folder, self.out)
            return
        os.rename(self.folder, self.joined)
        self.clear_joined()

    def was_joined(self, job: Job | None) -> bool:
        """Whether the store that is there was made of the parts that are just going, and they were of this job."""
        if self.folder.exists() or owner_of(self.out) != KIND:
            return False
        try:
            content = read_json(self.joined / JOB, dict[str, Any])
        except UserError:
            self.clear_joined()
            return False
        return job is None or content == job.file()

    def clear_joined(self) -> None:
        """Goes on with the removal of joined parts, where a kill came between."""
        if self.joined.is_dir() and is_ours(self.joined, WORK):
            with suppress(OSError):
                remove_folder(self.joined, JOB, FOLDER_MARKER)

    def parts(self) -> list[int]:
        """The numbers of the finished parts, ascending."""
        return finished_parts(self.folder)

    def part(self, number: int) -> Path:
        """Folder of a part."""
        return self.folder / part_name(number)

    def marker(self, number: int) -> Any:
        """What part.json says. Raises `UserError` when it cannot be read."""
        return read_json(self.part(number) / MARKER, Marker, PREPARE_AGAIN)

    def missing(self, numbers: Iterable[int]) -> Iterator[int]:
        """Those of ascending numbers whose parts are not there, up to the last part where that is known."""
        for number in numbers:
            there = self.parts()
            if there and there[-1] < number and self.marker(there[-1])["last"]:
                return
            if number not in there:
                yield number

    @contextmanager
    def new_part(self, number: int) -> Iterator[Path]:
        """A folder for a part, which gets its name in the end; where another process was faster its part stays."""
        folder = self.part(number).with_name(f"{part_name(number)}.partial-{unique()}")
        folder.mkdir()
        try:
            yield folder
            try:
                os.rename(folder, self.part(number))
            except OSError:
                if not (self.part(number) / MARKER).is_file():
                    raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
