"""The model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, an API): asked until it answers, each question
once.

Servers drop connections, stall, answer twice or cut an answer short. An answer counts only when it came whole, in time,
as one JSON document with one choice that says how it ended; everything else is asked again. Every answer is kept in a
file beside the result as soon as it is there, so that a run that was killed goes on where it was. When the result is
written the file goes: a model that is served anew under the same name must not inherit old answers.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from evaluation.generation import Sampling
from evaluation.judging.questions import Question
from evaluation.models import Written, sha256_of
from nano3.cli import UserError
from nano3.documents import Count, Name, check, json_lines, parse_json

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable whose value, if any, is sent as the server's key, as conversion/check_server.py does."""
ATTEMPTS = 12
"""At one answer, before the run stops; it can be started again."""
LONGEST_PAUSE = 20.0
"""Seconds between two attempts at most; they begin at a twentieth of a second and double."""
LARGEST_REPLY = 16 << 20

_ASK_AGAIN = (408, 409, 425, 429)
"""HTTP statuses below 500 that a later attempt may not meet."""


class _Function(TypedDict):
    name: Name
    arguments: str


class _Call(TypedDict):
    function: _Function


class _Message(TypedDict):
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[_Call] | None]


class _Choice(TypedDict):
    message: _Message
    finish_reason: str


class _Usage(TypedDict):
    completion_tokens: NotRequired[Count]


class _Reply(TypedDict):
    choices: list[_Choice]
    usage: NotRequired[_Usage | None]


class _Listed(TypedDict):
    id: Name


class _Models(TypedDict):
    data: list[_Listed]


class _Kept(TypedDict):
    key: str
    text: str
    finished: bool
    tokens: int | None


class _Refused(Exception):
    """The server will not answer this, however often it is asked."""


class _Again(Exception):
    """This attempt failed; the next may not. `pause`: seconds that the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key to another machine."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ServerModel:
    """As `evaluation.models.Model`, for written answers.

    Args:
        url: of the server, with or without /v1.
        served: the model's name there; the only one when None.
        cache: file of the answers so far.
        timeout: seconds for one attempt at an answer, from its first byte to its last.
        concurrency: requests at a time.
        thinking: whether the chat template is asked to open the reasoning.

    Raises:
        UserError: the server cannot be asked, or serves other models.
    """

    scores_letters = False

    def __init__(
        self, url: str, served: str | None, cache: Path, timeout: float, concurrency: int, thinking: bool
    ) -> None:
        if not timeout > 0:
            raise UserError(f"--timeout is {timeout}; give seconds above 0")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.concurrency, self.thinking, self.cache = timeout, concurrency, thinking, cache
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._writing = threading.Lock()
        self._stopping = threading.Event()
        self._prompts: list[str] = []
        self.served = self._chosen(served)
        self.name = f"{self.url} {self.served}"
        self.identity: dict[str, str] = {}
        self._kept = self._read_cache()

    def _chosen(self, wanted: str | None) -> str:
        listed = self._until_answered("/v1/models", None, lambda body: parse_json(body, _Models, self.url))
        served = [entry["id"] for entry in listed["data"]]
        wanted = served[0] if wanted is None and len(served) == 1 else wanted
        if wanted is None or wanted not in served:
            raise UserError(f"{self.url} serves {', '.join(served) or 'nothing'}; choose with --served-model")
        return wanted

    def answers(self, questions: Sequence[Question], limit: int, sampling: Sampling) -> list[list[Written]]:
        """As `Model.answers`; equal requests are sent once."""
        from tqdm import tqdm

        bodies = [[self._body(q, limit, sampling, sample) for sample in range(sampling.samples)] for q in questions]
        keys = [[sha256_of(self.url, json.dumps(body, sort_keys=True)) for body in several] for several in bodies]
        self._prompts.append(sha256_of(*(json.dumps([q.messages, q.tools], sort_keys=True) for q in questions)))
        asked = {key: body for several in zip(keys, bodies, strict=True) for key, body in zip(*several, strict=True)}
        left = {key: body for key, body in asked.items() if key not in self._kept}
        bar = tqdm(total=len(asked), initial=len(asked) - len(left), desc="answers", unit="answer", disable=None)
        with bar, ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._answer, key, body) for key, body in left.items()]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [[self._kept[key] for key in several] for several in keys]

    def _body(self, question: Question, limit: int, sampling: Sampling, sample: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.served,
            "messages": _openai_messages(question.messages),
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed * 1000 + sample,
            "chat_template_kwargs": {"enable_thinking": self.thinking},
        }
        tools = [{"type": "function", "function": tool} for tool in question.tools]
        return body | ({"tools": tools} if tools else {})

    def _answer(self, key: str, body: Mapping[str, Any]) -> None:
        """One answer, kept as soon as it is there."""
        limit = int(body["max_tokens"])
        written = self._until_answered("/v1/chat/completions", body, lambda data: _written(data, self.url, limit))
        row: _Kept = {"key": key, "text": written.text, "finished": written.finished, "tokens": written.tokens}
        with self._writing:
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._kept[key] = written

    def _until_answered(self, path: str, body: Mapping[str, Any] | None, read: Any) -> Any:
        """What `read` makes of the reply, asking again until there is one. Raises `UserError` for a refusal, and after
        `ATTEMPTS`."""
        reason = "the run was stopped"
        for attempt in range(ATTEMPTS):
            if self._stopping.is_set():
                break
            try:
                return read(self._post(path, body))
            except _Refused as error:
                raise UserError(str(error)) from None
            except _Again as error:
                reason, pause = str(error), error.pause
            except UserError as error:  # a reply that is not whole
                reason, pause = str(error), 0.0
            wait = min(LONGEST_PAUSE, max(pause, 0.05 * 2**attempt * random.uniform(0.5, 1.0)))
            self._stopping.wait(wait if attempt + 1 < ATTEMPTS else 0)
        raise UserError(
            f"{self.url}{path} gave no whole answer in {ATTEMPTS} attempts, the last time: {reason}; the answers so "
            "far are kept: start the command again when the server is well"
        )

    def _post(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        """The reply's bytes, all of them within the deadline. A connection serves one request: an answer that comes
        twice cannot be taken for the answer to the next question."""
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(
                urllib.request.Request(self.url + path, data, headers), timeout=self.timeout
            ) as reply:
                return self._read(reply, deadline)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(300).decode(errors="replace").split())
            if error.code >= 500 or error.code in _ASK_AGAIN:
                raise _Again(f"it answers {error.code} {said}", _seconds(error.headers.get("Retry-After"))) from None
            hint = f"; put the server's key into {KEY_VARIABLE}" if error.code in (401, 403) else ""
            raise _Refused(f"{self.url}{path} answers {error.code} {said}{hint}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Again(f"{getattr(error, 'reason', None) or error or type(error).__name__}") from None

    def _read(self, reply: Any, deadline: float) -> bytes:
        """All bytes; a server that sends them one by one does not hold us beyond the deadline."""
        parts, size = [], 0
        while part := reply.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if time.monotonic() > deadline:
                raise _Again(f"no whole answer within {self.timeout:g} s")
            if size > LARGEST_REPLY:
                raise _Again(f"more than {LARGEST_REPLY >> 20} MiB")
        length = reply.headers.get("Content-Length")
        if length is not None and int(length) != size:
            raise _Again(f"{size} of {length} bytes")
        return b"".join(parts)

    def _read_cache(self) -> dict[str, Written]:
        """The answers of an earlier start; a line that a killed process left unfinished is none."""
        if not self.cache.exists():
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            return {}
        data = self.cache.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(self.cache, len(whole))
        remedy = f"remove {self.cache} and start again"
        rows = [check(row, _Kept, where, remedy) for where, row in json_lines(self.cache)]  # type: ignore[arg-type]
        return {row["key"]: Written(row["text"], row["finished"], row["tokens"]) for row in rows}

    def letters(self, questions: Sequence[Question]) -> list[list[float]]:
        """Servers give the likeliest tokens only, of which a letter may be none. Raises `UserError`."""
        raise UserError(
            f"{self.url}: letters of {len(questions)} questions need the model's folder; say --method generate"
        )

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """At most one for each byte."""
        return [len(text.encode()) for text in texts]

    def hashes(self) -> dict[str, str]:
        """As `Model.hashes`; the template is the server's."""
        return {"prompts": sha256_of(*self._prompts), "template": sha256_of("the server's own")}

    def facts(self) -> dict[str, Any]:
        """As `Model.facts`."""
        return {"device": "server", "thinking": self.thinking, "chat_format": True}

    def done(self) -> None:
        """The result is written: the answers need not be kept."""
        self.cache.unlink(missing_ok=True)


def _openai_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as servers take them: a call has an id and its arguments as JSON text, a tool's answer names its call.

    Answers come in the order of the calls. Other messages are as they were.
    """
    sent: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for number, message in enumerate(messages):
        one = dict(message)
        if calls := one.get("tool_calls"):
            open_calls = [f"call-{number}-{place}" for place in range(len(calls))]
            one["tool_calls"] = [_openai_call(name, call) for name, call in zip(open_calls, calls, strict=True)]
        elif one["role"] == "tool" and open_calls:
            one["tool_call_id"] = open_calls.pop(0)
        sent.append(one)
    return sent


def _openai_call(name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _seconds(header: str | None) -> float:
    """A Retry-After in seconds; dates and nonsense ask for nothing."""
    return float(header) if header and header.isdigit() else 0.0


def _written(data: bytes, where: str, limit: int) -> Written:
    """A reply's answer. Raises `UserError` for no JSON, and `_Again` for an answer that was cut without reason."""
    reply = parse_json(data, _Reply, where, "ask again")
    if len(reply["choices"]) != 1:
        raise _Again(f"{len(reply['choices'])} choices instead of one")
    [choice] = reply["choices"]
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    if choice["finish_reason"] not in ("stop", "length", "tool_calls"):
        raise _Again(f"the answer ended by {choice['finish_reason']!r}")
    if choice["finish_reason"] == "length" and tokens is not None and tokens < limit:
        raise _Again(f"the answer was cut after {tokens} of {limit} tokens")
    return Written(_text(choice["message"]), choice["finish_reason"] != "length", tokens)


def _text(message: _Message) -> str:
    """Content, with reasoning and tool calls that the server took out of it as the model's own format has them."""
    text = message.get("content") or ""
    if reasoning := message.get("reasoning_content"):
        text = f"{reasoning}</think>{text}"
    for call in message.get("tool_calls") or ():
        text += _call_text(call["function"])
    return text


def _call_text(function: _Function) -> str:
    try:
        given = parse_json(function["arguments"] or "{}", dict[str, Any], "the arguments").items()
    except UserError:
        return f"<tool_call>\n<function={function['name']}>\n{function['arguments']}"  # broken, and judged so
    lines = [f"<parameter={name}>\n{_plain(value)}\n</parameter>" for name, value in given]
    return "\n".join(["<tool_call>", f"<function={function['name']}>", *lines, "</function>", "</tool_call>", ""])


def _plain(value: Any) -> str:
    if isinstance(value, str | bool) or value is None:
        return str(value)
    return json.dumps(value, ensure_ascii=False)
