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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from evaluation.chat_completions import LIKELIEST, Again, Refused, likeliest, openai_messages, written
from evaluation.generation import GREEDY, Sampling
from evaluation.judging.questions import Question
from evaluation.models import Written
from evaluation.prompts import sha256_of
from nano3.cli import UserError
from nano3.documents import Finite, Name, check, json_lines, parse_json
from nano3.network import ask, check_address, without
from nano3.row_keys import LETTERS

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable whose value, if any, is sent as the server's key, as conversion/check_server.py does."""
ATTEMPTS = 12
"""At one answer, before the run stops; it can be started again."""
LONGEST_PAUSE = 20.0
"""Seconds between two attempts at most; they begin at a twentieth of a second and double."""

_ASK_AGAIN = (408, 409, 425, 429)
"""HTTP statuses below 500 that a later attempt may not meet."""


class _Listed(TypedDict):
    id: Name


class _Models(TypedDict):
    data: list[_Listed]


class _KeptAnswer(TypedDict):
    """A written answer in the file."""

    key: str
    text: str
    finished: bool
    tokens: int | None
    asked: NotRequired[int | None]


class _KeptLetters(TypedDict):
    """The likeliest first tokens in the file, with their log-probabilities."""

    key: str
    likeliest: dict[str, Finite]


class ServerModel:
    """As `evaluation.models.Model`: written answers, and letters where the server gives log-probabilities.

    Args:
        url: of the server, with or without /v1.
        served: the model's name there; the only one when None.
        cache: file of the answers so far.
        timeout: seconds for one attempt at an answer, from its first byte to its last.
        concurrency: requests at a time.
        thinking: whether the chat template is asked to open the reasoning.
        per_minute: requests in a minute at most, attempts counted; None for as many as come.

    Raises:
        UserError: the server cannot be asked, or serves other models.
    """

    scores_letters = False

    def __init__(
        self,
        url: str,
        served: str | None,
        cache: Path,
        timeout: float,
        concurrency: int,
        thinking: bool,
        per_minute: float | None = None,
    ) -> None:
        if not timeout > 0:
            raise UserError(f"--timeout is {timeout}; give seconds above 0")
        self.url = check_address(url).rstrip("/").removesuffix("/v1")
        self.timeout, self.concurrency, self.thinking, self.cache = timeout, concurrency, thinking, cache
        self._between = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0
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
        bodies = [[self._body(q, limit, sampling, sample) for sample in range(sampling.samples)] for q in questions]
        kept = self._all(bodies, lambda data: written(data, self.url, limit), "answers")
        self._remember_prompts(questions)
        return [
            [Written(one["text"], one["finished"], one["tokens"], one.get("asked")) for one in several]
            for several in kept
        ]

    def letters(self, questions: Sequence[Question]) -> list[list[float]]:
        """As `Model.letters`, from the likeliest first tokens. A letter that is not among them is less likely than all
        of them: it gets the lowest of their log-probabilities.

        Raises `UserError` for a server that gives none, and for a question of whose letters none is among them.
        """
        asked = {"logprobs": True, "top_logprobs": LIKELIEST}
        bodies = [[self._body(question, 1, GREEDY, 0, thinking=False) | asked] for question in questions]
        kept = self._all(bodies, lambda data: likeliest(data, self.url), "letters")
        self._remember_prompts(questions)
        return [self._letters(q, one["likeliest"]) for q, [one] in zip(questions, kept, strict=True)]

    def _letters(self, question: Question, first: Mapping[str, float]) -> list[float]:
        letters = LETTERS[: len(question.choices)]
        if not any(letter in first for letter in letters):
            raise UserError(
                f"{self.url}: none of the letters of question {question.id} is among the {len(first)} likeliest "
                "tokens; say --method generate, or score the model's folder"
            )
        lowest = min(first.values())
        return [first.get(letter, lowest) for letter in letters]

    def _remember_prompts(self, questions: Sequence[Question]) -> None:
        self._prompts.append(sha256_of(*(json.dumps([q.messages, q.tools], sort_keys=True) for q in questions)))

    def _all(self, bodies: Sequence[Sequence[dict[str, Any]]], read: Callable[[bytes], Any], what: str) -> Any:
        """What `read` makes of the reply to every body, in their order; those that are kept are not asked again."""
        from tqdm import tqdm

        keys = [[sha256_of(self.url, json.dumps(body, sort_keys=True)) for body in several] for several in bodies]
        asked = {key: body for several in zip(keys, bodies, strict=True) for key, body in zip(*several, strict=True)}
        left = {key: body for key, body in asked.items() if key not in self._kept}
        bar = tqdm(total=len(asked), initial=len(asked) - len(left), desc=what, unit="answer", disable=None)
        with bar, ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._answer, key, body, read) for key, body in left.items()]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [[self._kept[key] for key in several] for several in keys]

    def _body(
        self, question: Question, limit: int, sampling: Sampling, sample: int, thinking: bool | None = None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.served,
            "messages": openai_messages(question.messages),
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed * 1000 + sample,
            "chat_template_kwargs": {"enable_thinking": self.thinking if thinking is None else thinking},
        }
        tools = [{"type": "function", "function": tool} for tool in question.tools]
        return body | ({"tools": tools} if tools else {})

    def _answer(self, key: str, body: Mapping[str, Any], read: Callable[[bytes], Any]) -> None:
        """One answer, kept as soon as it is there."""
        row = {"key": key, **self._until_answered("/v1/chat/completions", body, read)}
        with self._writing:
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._kept[key] = row

    def _until_answered(self, path: str, body: Mapping[str, Any] | None, read: Any) -> Any:
        """What `read` makes of the reply, asking again until there is one. Raises `UserError` for a refusal, and after
        `ATTEMPTS`."""
        reason = "the run was stopped"
        for attempt in range(ATTEMPTS):
            if self._stopping.is_set():
                break
            try:
                return read(self._post(path, body))
            except Refused as error:
                raise UserError(str(error)) from None
            except Again as error:
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
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps(body).encode()
        self._wait_for_turn()
        try:
            answer = ask(self.url + path, headers, data, self.timeout)
        except TimeoutError:
            raise Again(f"no whole answer within {self.timeout:g} s") from None
        except UserError as error:  # a redirect, or more than any answer has
            raise Refused(str(error)) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Again(without(key, str(error) or type(error).__name__)) from None
        if answer.status == 200:
            return answer.body
        said = without(key, " ".join(answer.body[:300].decode(errors="replace").split()))
        if answer.status >= 500 or answer.status in _ASK_AGAIN:
            raise Again(f"it answers {answer.status} {said}", _seconds(answer.headers.get("Retry-After")))
        hint = f"; put the server's key into {KEY_VARIABLE}" if answer.status in (401, 403) else ""
        raise Refused(f"{self.url}{path} answers {answer.status} {said}{hint}")

    def _wait_for_turn(self) -> None:
        """Spaces the requests of all threads evenly over a minute."""
        if self._between:
            with self._writing:
                now = time.monotonic()
                self._free_at = max(now, self._free_at) + self._between
                wait = self._free_at - self._between - now
            self._stopping.wait(wait)

    def _read_cache(self) -> dict[str, dict[str, Any]]:
        """The answers of an earlier start; a line that a killed process left unfinished is none."""
        if not self.cache.exists():
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            return {}
        data = self.cache.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(self.cache, len(whole))
        remedy = f"remove {self.cache} and start again"
        kept = {}
        for where, row in json_lines(self.cache):
            schema: Any = _KeptLetters if "likeliest" in row else _KeptAnswer
            kept[check(row, schema, where, remedy)["key"]] = row
        return kept

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


def _seconds(header: str | None) -> float:
    """A Retry-After in seconds; dates and nonsense ask for nothing."""
    return float(header) if header and header.isdigit() else 0.0
