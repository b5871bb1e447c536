"""What a preparation met on its way, for the manifest of the store and for the lines at the end."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import MaxLen, MinLen
from typing_extensions import TypedDict

from data_prep.chat import Segment, is_empty
from data_prep.chat_rows import ChatRows
from data_prep.drops import Dropped, Drops
from nano3.conversations import Conversation
from nano3.documents import Count, Text, closed
from nano3.row_keys import FACTS
from nano3.token_store import TokenStore


@closed
class TurnFacts(TypedDict):
    """`vars` of `Turns`, as a part's file holds them."""

    answered: Count
    thought: Count
    context_only: Count


class FindFacts(TypedDict):
    """`vars` of `Finds`, as a part's file holds them."""

    split_rows: Count
    split_documents: Count
    empty_turns: Count
    empty_rows: Count
    empty_examples: list[Text]
    other_keys: dict[Text, Count]
    nulls: dict[Text, Annotated[list[Count], MinLen(2), MaxLen(2)]]
    forms: list[Text]
    left_out: dict[Text, list[Dropped]]
    evaluation_only: dict[Text, Count]


SHOWN = 3
"""Rows that a line of the summary names."""


@dataclass
class Turns:
    """Assistant turns by what the loss makes of them, in the documents of the store."""

    answered: int = 0
    thought: int = 0
    context_only: int = 0

    def count(self, turns: int, segments: Sequence[Segment]) -> None:
        """Adds the assistant's turns of a rendered document, of which there are `turns`."""
        before = ""
        for segment in segments:
            if segment.supervised:
                thought = before.endswith("<think>\n")
                self.thought += thought
                self.answered += not thought
                turns -= 1
            before = segment.text
        self.context_only += turns

    def merge(self, later: Mapping[str, int]) -> None:
        """Adds the `vars` of another one."""
        for name, value in later.items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Finds:
    """What was met on the way and is worth a line in the end; all of it goes into the manifest."""

    split_rows: int = 0
    split_documents: int = 0
    empty_turns: int = 0
    empty_rows: int = 0
    empty_examples: list[str] = field(default_factory=list)
    other_keys: Counter[str] = field(default_factory=Counter)
    nulls: dict[str, list[int]] = field(default_factory=dict)
    """`function.argument` -> [calls in which it is null, calls in which it is not]."""
    forms: list[str] = field(default_factory=list)
    """Inputs whose rows were no chat rows, and what they were read as."""
    left_out: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Number of an input -> what its form leaves out: reasons, counts, examples."""
    evaluation_only: Counter[str] = field(default_factory=Counter)
    """Source -> rows whose publishers' terms allow evaluation only."""

    def read(self, row: Conversation) -> None:
        """Takes note of a row's unused keys, empty turns and null arguments."""
        if others := row.fields.keys() - FACTS:
            self.other_keys.update(others)
        if row.fields.get("evaluation_only"):
            self.evaluation_only[row.source] += 1
        for message in row.messages:
            self.empty_turns += message["role"] == "assistant" and is_empty(message)
            for call in message.get("tool_calls", ()):
                for name, value in call["arguments"].items():
                    self.nulls.setdefault(f"{call['name']}.{name}", [0, 0])[value is not None] += 1

    def take(self, number: int, rows: ChatRows) -> None:
        """Takes note of what input `number` met since its tallies were last cleared."""
        if rows.form is not None and rows.form.others != "pass":
            self.other_keys.update(rows.unused)
            self.forms.append(f"{rows.name}: rows of the form {rows.form.name}, {rows.reason}")
        if rows.drops.total:
            self.left_out[str(number)] = rows.drops.facts()

    def merge(self, later: Mapping[str, Any]) -> None:
        """Adds what was met after this; `later` is the `vars` of another one."""
        for name in ("split_rows", "split_documents", "empty_turns", "empty_rows"):
            setattr(self, name, getattr(self, name) + later[name])
        self.empty_examples += later["empty_examples"][: SHOWN - len(self.empty_examples)]
        self.other_keys.update(later["other_keys"])
        self.evaluation_only.update(later["evaluation_only"])
        self.forms += [line for line in later["forms"] if line not in self.forms]
        for name, (null, given) in later["nulls"].items():
            before = self.nulls.get(name, [0, 0])
            self.nulls[name] = [before[0] + null, before[1] + given]
        for number, facts in later["left_out"].items():
            drops = Drops()
            drops.merge(self.left_out.get(number, ()))
            drops.merge(facts)
            self.left_out[number] = drops.facts()

    def drop_empty(self, row: Conversation) -> None:
        """Counts a row that has nothing to learn because its answers are empty."""
        self.empty_rows += 1
        if len(self.empty_examples) < SHOWN:
            self.empty_examples.append(row.where)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        left_out = [fact for facts in self.left_out.values() for fact in facts]
        return vars(self) | {"nulls": self.all_null(), "left_out": left_out}

    def all_null(self) -> dict[str, int]:
        """Arguments that are null in all of their calls, and how many these are: Arrow makes them of several tools."""
        return {name: null for name, (null, given) in sorted(self.nulls.items()) if null and not given}


def print_summary(store: TokenStore, facts: dict[str, Any]) -> None:
    """Prints what is in the store and how full the packs are; warnings go to stderr."""
    manifest = store.manifest
    total, supervised = manifest["tokens"], manifest["supervised_tokens"]
    print(f"{store.folder}: {len(store):,} documents, {total:,} tokens, {supervised:,} supervised", end=" ")
    print(f"({supervised / total:.1%}), longest document {manifest['longest_document']:,} tokens")
    if store.weighted:
        print(f"  loss weights: {', '.join(format(weight, 'g') for weight in sorted(manifest['weights']))}")
    for name, counts in manifest["sources"].items():
        print(f"  {name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens", end=", ")
        print(f"{counts['supervised_tokens']:,} supervised")
    turns = manifest["turns"]
    print(f"  assistant turns: {turns['answered']:,} direct, {turns['thought']:,} with reasoning", end=", ")
    print(f"{turns['context_only']:,} without loss (context only)")
    _print_finds(manifest["finds"])
    print_packs(facts)


def _print_finds(finds: dict[str, Any]) -> None:
    for line in finds["forms"]:
        print(f"  {line}")
    for drop in finds["left_out"]:
        where = ", ".join(example["where"] for example in drop["examples"])
        print(f"  left out, {drop['reason']}: {drop['rows']:,} ({where})")
    if finds["evaluation_only"]:
        print(f"  for evaluation only, never trained on: {', '.join(finds['evaluation_only'])}")
    if finds["split_rows"]:
        print(f"  {finds['split_rows']:,} rows became {finds['split_documents']:,} documents", end=", ")
        print("one for each user message, since earlier turns have reasoning (off: --split-turns off)")
    if finds["empty_turns"]:
        print(f"  empty answers: {finds['empty_turns']:,} turns without loss", end=", ")
        print(f"{finds['empty_rows']:,} rows dropped {' '.join(finds['empty_examples'])}".rstrip())
    if finds["other_keys"]:
        print("  row keys that the prompt and the loss do not use: ", end="")
        print(", ".join(f"{key} ({count:,})" for key, count in sorted(finds["other_keys"].items())))
    for name, calls in finds["nulls"].items():
        print(
            f"warning: the argument {name} is null in all {calls:,} of its calls; Arrow writes such nulls when tools "
            "share a column. The model is taught to write None there; --drop-null-arguments leaves it out",
            file=sys.stderr,
        )


def print_packs(facts: dict[str, Any]) -> None:
    """Prints one line on a pack index."""
    print(f"  packs of {facts['seq_length']:,}: {facts['packs']:,}, {facts['efficiency']:.2%} full", end=", ")
    print(f"at most {facts['most_documents_in_a_pack']} documents in one", end=", ")
    print(f"{facts['dropped_documents']:,} documents left out as too long")
