"""Chat rows of any input: the rows that nano3/rows.py reads, brought from their form to `messages`.

rows = ChatRows("train.csv")                # or form="medmcqa", or a form of data_prep/forms/mapping.py
for row in rows: row.fields["messages"], row.where
rows.form.name, rows.reason, rows.unused, rows.drops, rows.facts
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.drops import Drops
from data_prep.forms.form import Form, guess, to_chat
from data_prep.forms.said import said
from data_prep.forms.usual import FORMS
from data_prep.sources import SOURCES
from data_prep.sources.source import Source
from nano3.cli import UserError
from nano3.conversations import Conversations
from nano3.rows import Row, Rows, open_rows, split_of

KNOWN: tuple[Form, ...] = (*FORMS, *SOURCES)
"""Every form by which a row can be known, the usual ones first."""


def form_named(name: str) -> Form | None:
    """A form by its name; None for `auto`. Raises `UserError` for a name that there is not."""
    if name == "auto":
        return None
    found = {form.name: form for form in KNOWN}
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(found)}"
        raise UserError(f"no form is called {name!r}; {hint}")
    return found[name]


class ChatRows(Rows):
    """The rows of an input as chat rows, read once.

    `form` None guesses it from the first row. While rows come, `form` and `reason` say which it is and why, `unused`
    counts keys that change nothing, `drops` rows that a named data set leaves out, `evaluation_rows` rows that must
    not be trained on; `facts`, at the end, what was read. `say`: what multiple-choice rows are to say, one of
    `data_prep.forms.said.SAY`.
    """

    def __init__(
        self, source: Path | str, form: Form | None = None, ignored: Collection[str] = (), say: str = ""
    ) -> None:
        self._opened = open_rows(source)  # refuses what cannot be read before anything else happens
        super().__init__(self._opened.name)
        self.source, self.form, self.ignored, self.say = source, form, ignored, say
        self.reason = "as you asked"
        self.unused: Counter[str] = Counter()
        self.drops = Drops()
        self.evaluation_rows = 0

    def _rows(self) -> Iterator[Row]:
        rows = self._opened.unparsed()
        if self.form is None:
            first = next(rows)
            self.form, self.reason = self._guessed(first)
            rows = chain([first], rows)
        if isinstance(self.form, Source):
            made = self._named(self.form)
        else:
            form = self.form
            made = (Row(partial(self._chat, form, row), row.where) for row in rows)
        yield from map(self._said, made) if self.say else made

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What was read, of a named data set or of the input."""
        return self._facts or self._opened.facts

    def _said(self, row: Row) -> Row:
        def fields() -> dict[str, Any]:
            try:
                return said(row.fields, self.say)
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from error

        return Row(fields, row.where)

    def _guessed(self, first: Row) -> tuple[Form, str]:
        """The form of the first row, and the reason."""
        try:
            form, reason = guess(first.fields, KNOWN)
        except UserError as error:
            raise UserError(f"{first.where}: {error}") from error
        if isinstance(form, Source) and str(self.source) == "-":
            raise UserError(f"standard input holds {form.name} ({reason}); give the file, which is read from its start")
        return form, reason

    def _chat(self, form: Form, row: Row) -> dict[str, Any]:
        try:
            return to_chat(form, row.fields, self.unused, self.ignored)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error

    def _named(self, source: Source) -> Iterator[Row]:
        """Rows of a named data set, each question once."""
        split, seen = split_of(Path(self.source).name), set()
        for row in source.read(self.source, self._facts):
            reason = source.drop(row.fields)
            if reason:
                self.drops.add(reason, row.where, str(row.fields.get("id", "")))
                continue
            chat = self._chat(source, row)
            text = json.dumps([chat["messages"], chat.get("tools")])
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if source.distinct and digest in seen:
                self.drops.add(
                    "the same question and answer as a row before", row.where, str(chat["messages"][-2]["content"])
                )
                continue
            seen.add(digest)
            facts = {"source": source.name, "terms": source.terms} | ({"split": split} if split else {}) | chat
            if source.evaluation_only or facts.get("split", "train") != "train":
                self.evaluation_rows += 1
                facts["evaluation_only"] = True
            yield Row(facts, row.where)


def read_conversations(source: Path | str, form: Form | None = None, ignored: Collection[str] = ()) -> Conversations:
    """The conversations of an input in any form."""
    return Conversations(ChatRows(source, form, ignored))
