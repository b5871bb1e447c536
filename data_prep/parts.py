"""The parts of a store while it is prepared: its input cut into shards by rows, each written by itself.

    .NAME.unfinished/job.json        what decides the bytes: inputs, tokenizer, options, rows in a shard
    .NAME.unfinished/part-00003/     the arrays of shard 3, and part.json, written last
    .NAME.unfinished/store/          what is being joined (data_prep/join.py)

A part is written under another name and renamed when it is whole: what has its name is finished. So whoever comes next
does the shards that are not there, on this host or another one. Where the input is cut depends on its rows alone, so
the bytes are the same for any number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from data_prep.chat_rows import ChatRows, form_named
from data_prep.documents import Options
from data_prep.drops import Drops
from data_prep.own_template import TemplateCheck
from data_prep.summary import FindFacts, TurnFacts
from nano3.cli import UserError
from nano3.conversations import Conversation, conversation
from nano3.documents import AboveZero, Count, FileName, Name, Text, as_json, read_json
from nano3.file_digests import file_sha256, remembered_sha256
from nano3.file_system import locked, unique
from nano3.outputs import discard
from nano3.rows import Row, files_of
from nano3.sealed_folder import is_ours, mark
from nano3.store_parts import MARKER, PREPARE_AGAIN, finished_parts
from nano3.token_store import Counts, FileFacts, part_name, tokenizer_file, unfinished_folder

SHARD_ROWS = 50_000
"""Rows of a shard: about a minute of work for a process at 400 tokens a row, which is what a kill costs it."""
FORMAT = "token-part"
VERSION = 1
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


@dataclass(frozen=True)
class Job:
    """What is to be prepared. `form` is the options' by name: a process is told no functions."""

    inputs: tuple[str, ...]
    tokenizer: str
    options: Options
    form: str = "auto"
    shard_rows: int = SHARD_ROWS

    @classmethod
    def of(cls, inputs: Sequence[Path | str], tokenizer: Path | str, options: Options, shard_rows: int) -> Job:
        """The job of these arguments."""
        form = options.form.name if options.form else "auto"
        return cls(tuple(map(str, inputs)), str(tokenizer), replace(options, form=None), form, shard_rows)

    @property
    def reads_again(self) -> bool:
        """Whether every input can be read from its start again: what standard input and a hub give may not be."""
        return not any(source == "-" or source.startswith("hub:") for source in self.inputs)

    def chats(self) -> list[ChatRows]:
        """The inputs, to be read from their start."""
        return [ChatRows(source, form_named(self.form), self.options.ignored) for source in self.inputs]

    def input_files(self) -> list[dict[str, str]]:
        """Name and SHA-256 of every file of the inputs, as a store's manifest has them."""
        files = [file for source in self.inputs for file in _files(Path(source))]
        digests = remembered_sha256(files)
        return [{"name": file.name, "sha256": digests[file]} for file in files]

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the parts, as JSON values; files by name, size and mtime in ns."""
        inputs: list[Any] = (
            [_stamps(Path(source)) for source in self.inputs] if self.reads_again else [uuid.uuid4().hex]
        )
        return {
            "version": VERSION,
            "inputs": inputs,
            "tokenizer": file_sha256(tokenizer_file(self.tokenizer)),
            "template": TemplateCheck(self.tokenizer).facts(),
            "options": as_json(asdict(self.options)),
            "form": self.form,
            "shard_rows": self.shard_rows,
        }

    def file(self) -> dict[str, Any]:
        """The content of job.json."""
        return {
            "identity": self.identity(),
            "tokenizer_folder": self.tokenizer,
            "thinking": self.options.thinking,
            "no_loss": list(self.options.no_loss),
        }


def _files(path: Path) -> list[Path]:
    return files_of(path) if path.is_dir() else [path]


def _stamps(path: Path) -> list[Any]:
    stats = [(str(file.resolve()), file.stat()) for file in _files(path)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


class ShardReader:
    """The inputs' rows, one after the other, handed out shard by shard; shards that are not asked for are skipped
    without being parsed.

    Row `shard * rows` to `(shard + 1) * rows` are a shard; one row is always read ahead, so that the last shard knows
    that it is the last.
    """

    def __init__(self, chats: Sequence[ChatRows], rows: int) -> None:
        self.chats, self.rows = chats, rows
        self._rows = ((chat, row) for chat in chats for row in chat.unparsed())
        self._ahead: tuple[ChatRows, Row] | None = None
        self._position = -1
        self.touched: set[int] = set()
        """Inputs that the shard has rows of."""

    @property
    def ended(self) -> bool:
        """Whether no row follows."""
        return self._position >= 0 and self._ahead is None

    def begin(self, shard: int) -> bool:
        """Goes to the start of a shard; whether there is a row. The tallies of the inputs begin anew."""
        if self._position < 0:
            self._next()
        while self._ahead is not None and self._position < shard * self.rows:
            self._next()
        if shard:
            for chat in self.chats:
                chat.unused.clear()
                chat.drops = Drops()
        self.touched = set()
        return self._ahead is not None

    def shard(self) -> Iterator[Conversation]:
        """The rows from here to the end of the shard."""
        end = self._position + self.rows
        while self._ahead is not None and self._position < end:
            chat, row = self._ahead
            self.touched.add(self.chats.index(chat))
            yield conversation(row.fields, row.where, chat.name)
            self._next()

    def _next(self) -> None:
        self._ahead = next(self._rows, None)
        self._position += 1


class Work:
    """The folder of a store's parts, beside its place `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.folder = unfinished_folder(out)

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
        """Whole, and not in the place of what another process wrote meanwhile."""
        new = self.folder / f"{JOB}.{unique()}"
        new.write_text(json.dumps(content))
        try:
            os.link(new, self.folder / JOB)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(new, self.folder / JOB)
        new.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes all of it, at once for whoever looks: half of it must not be resumed from. Raises as `begin` does."""
        if self.folder.is_dir():
            self.make()
            self.refuse_running()
            discard(self.folder, self.out)

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
