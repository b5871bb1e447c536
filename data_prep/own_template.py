"""A folder's own chat template beside ours: what a user of the tuned model will send must be what it was trained on.

Serving renders with the template in the tokenizer's folder, and the members of a family differ there by a newline that
nobody sees. So both render the same probe conversations, and the first character that differs stops the preparation.
A probe is rendered when the data first needs what it probes: a template without tools is fine for data without them.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack
from typing import Any, NamedTuple

from data_prep.chat import text_of
from data_prep.chat_formats import NEMOTRON, ChatFormat
from nano3.cli import UserError
from nano3.documents import read_json
from nano3.messages import checked_messages, checked_tools
from nano3.token_store import tokenizer_file

LARGEST_TEMPLATE = 1 << 20
"""Bytes; published templates have some ten thousand."""
LONGEST_TEXT = 1 << 20
"""Characters that a template may multiply a text to; probes render to some thousand."""
SECONDS = 5
"""That all probes may take; they take hundredths."""
DEEPEST = 1000
"""Calls within each other, as Python allows; a process may have raised that limit."""


class Probe(NamedTuple):
    """A conversation to render, and the features of data that call for it."""

    needs: frozenset[str]
    messages: list[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    prompt: bool = False
    thinking: bool = False


def _probes() -> list[Probe]:
    user, again = {"role": "user", "content": " What is 2+2?\n"}, {"role": "user", "content": "And <b>3</b> & 'ü'?"}
    system = {"role": "system", "content": "Be brief. "}
    answer = {"role": "assistant", "content": " It is 4.\n\nYes. "}
    thought = answer | {"reasoning_content": "2+2\nis 4"}
    arguments = {"city": 'Zürich, "CH"', "days": 2, "metric": True, "parts": ["sky", {"wind": 1.5}], "box": {"a": None}}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    saying = {"role": "assistant", "content": "Let me look. ", "tool_calls": [call]}
    results = [{"role": "tool", "content": "sunny\n"}, {"role": "tool", "content": "7 °C"}]
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": " Where.\n"},
            "unit": {"type": "string", "enum": ["°C", "F"], "default": "F", "minLength": 1},
            "box": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Tells. ", "parameters": schema, "strict": True},
        },
        {"type": "function", "function": {"name": "now"}},
    ]
    plain, reasoning, calls, defined = map(frozenset, ((), ("reasoning",), ("calls",), ("tools",)))
    return [
        Probe(plain, [user, answer]),
        Probe(plain, [system, user, answer, again, answer]),
        Probe(plain, [system, user], prompt=True),
        Probe(reasoning, [user, thought]),
        Probe(reasoning, [system, user, thought, again, thought]),
        Probe(reasoning, [user, thought, again], prompt=True, thinking=True),
        Probe(calls, [user, calling, *results, saying, results[0], answer, again, saying, *results, answer]),
        Probe(calls, [user, saying, *results], prompt=True),
        Probe(calls | reasoning, [user, calling | {"reasoning_content": "look"}, *results, thought]),
        Probe(calls | reasoning, [user, saying | {"reasoning_content": "look"}, results[0], thought, again, thought]),
        Probe(defined, [system, user, answer], tools),
        Probe(defined, [user], tools, prompt=True),
    ]


class TemplateCheck:
    """The comparison for one tokenizer folder. A folder without a template has nothing to differ.

    Raises:
        UserError: a template that cannot be read.
    """

    def __init__(self, folder: Path | str, ours: ChatFormat = NEMOTRON) -> None:
        self.ours = ours
        self.path, self._text, self._marks = _own_template(tokenizer_file(folder).parent)
        self._waiting = _probes() if self._text is not None else []
        self._template: Any = None

    def check(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
        """Renders the probes that this conversation is the first to need.

        Raises:
            UserError: the template writes something else than ours; with the first character that differs.
        """
        if not self._waiting:
            return
        features = {"tools"} if tools else set()
        for message in messages:
            features |= {"reasoning"} if message.get("reasoning_content") else set()
            features |= {"calls"} if message.get("tool_calls") or message["role"] == "tool" else set()
        due = [probe for probe in self._waiting if probe.needs <= features]
        self._waiting = [probe for probe in self._waiting if not probe.needs <= features]
        if due:
            with _limited(self.path):
                for probe in due:
                    self._compare(probe)

    def facts(self) -> dict[str, Any]:
        """For a store's manifest: the SHA-256 of the template, and whether it is the folder's own."""
        text = self.ours.template.read_text() if self._text is None else self._text
        return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "own": self._text is not None}

    def _compare(self, probe: Probe) -> None:
        ours = text_of(
            self.ours.render(checked_messages(probe.messages), probe.thinking, probe.prompt, checked_tools(probe.tools))
        )
        theirs = self._render(probe)
        if theirs == ours:
            return
        place = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        start = max(0, place - 20)
        raise UserError(
            f"the chat template in {self.path} differs from this project's at character {place} of a probe: "
            f"{theirs[start : place + 20]!r} there, {ours[start : place + 20]!r} here; the model would be asked in "
            "another format than it learned: use the tokenizer folder of "
            f"{self.ours.name} (others: docs/family.md)"
        )

    def _render(self, probe: Probe) -> str:
        try:
            if self._template is None:
                self._template = compiled(str(self._text))
            return self._template.render(
                messages=probe.messages,
                tools=list(probe.tools) or None,
                documents=None,
                add_generation_prompt=probe.prompt,
                enable_thinking=probe.thinking,
                **self._marks,
            )
        except UserError:  # it takes too long
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            needs = " and ".join(sorted(probe.needs)) or "plain text"
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the chat template in {self.path} refuses a probe conversation with {needs} ({reason}); "
                f"use the tokenizer folder of {self.ours.name}"
            ) from error


def _own_template(folder: Path) -> tuple[Path, str | None, dict[str, str]]:
    """File and text of a folder's template, None where it has none, and the marks that templates may use."""
    config_file, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _config(config_file) if config_file.is_file() else {}
    marks = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        mark = config.get(name)
        mark = mark.get("content") if isinstance(mark, dict) else mark
        if isinstance(mark, str):
            marks[name] = mark
    if file.is_file():
        if file.stat().st_size > LARGEST_TEMPLATE:
            raise UserError(f"{file} has more than {LARGEST_TEMPLATE:,} bytes, which no chat template has")
        try:
            return file, file.read_text(encoding="utf-8"), marks
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text ({error.reason}); download it again") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next(
            (one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"), None
        )
    if template is not None and not isinstance(template, str):
        raise UserError(f"{config_file}: 'chat_template' is no text; download the file again")
    return config_file, template, marks


def _config(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], "download it again")


def compiled(text: str) -> Any:
    """A chat template, ready to render, with Jinja as transformers sets it up: sandboxed, a few additions; bounded."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The `{% generation %}` marks of the usual loss mask: they write nothing."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Node | list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
            if operator == "**" or abs(sizes[0] * sizes[1]) > LONGEST_TEXT:
                raise SecurityError("multiplies a text or a number beyond every use")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    return environment.from_string(text)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


@contextmanager
def _limited(path: Path) -> Iterator[None]:
    """Stops a template that does not come to an end, by the time that this process computes, or that nests too deep:
    what a compiler does with it may be out of a signal's reach."""

    def stop(number: int, frame: Any) -> None:
        del number, frame
        raise UserError(f"the chat template in {path} takes longer than {SECONDS} s for a few lines; download it again")

    before, deepest = signal.signal(signal.SIGVTALRM, stop), sys.getrecursionlimit()
    sys.setrecursionlimit(min(deepest, sum(1 for _ in walk_stack(None)) + DEEPEST))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)  # and again each second: Python drops what is raised in a hook
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        sys.setrecursionlimit(deepest)
