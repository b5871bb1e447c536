"""What a store is prepared of: the job, and its input cut into shards by rows.

Where the input is cut depends on its rows alone, so the bytes are the same for any number of processes. The shards'
parts on the disk: data_prep/part_folder.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.chat_rows import ChatRows, form_named
from data_prep.documents import Options
from data_prep.drops import Drops
from data_prep.own_template import TemplateCheck
from nano3.conversations import Conversation, conversation
from nano3.documents import as_json
from nano3.file_digests import file_sha256
from nano3.rows import Row, files_of
from nano3.token_store import tokenizer_file

SHARD_ROWS = 50_000
"""Rows of a shard: about a minute of work for a process at 400 tokens a row, which is what a kill costs it."""
VERSION = 1


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


def _stamps(path: Path) -> list[Any]:
    files = files_of(path) if path.is_dir() else [path]
    stats = [(str(file.resolve()), file.stat()) for file in files]
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
