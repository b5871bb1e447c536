"""Asks a running vLLM what conversion/golden.py computed: the first thing to run after a deployment.

    python conversion/check_server.py http://localhost:8000 --golden FP8.golden.safetensors

Sends every prompt as token ids to /v1/completions and compares the log-probabilities of its tokens; sends its text to
/tokenize and compares the ids. Prints the largest difference of each prompt. Exit code 0 when all are within the file's
tolerances, 1 when the server answers something else, 2 when it cannot be asked.

What is asked and read is vLLM's extension of OpenAI's completions: `prompt_logprobs` of the request, and of a choice in
the response a list with null for the first token and {token id: {logprob, rank, decoded_token}} for each other
(vllm/entrypoints/openai/completion/protocol.py, vllm/entrypoints/serve/tokenize/protocol.py, as of November 2026).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.fp8.golden_file import Golden
from nano3.cli import UserError, run

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable whose value, if any, is sent as the server's key (vLLM reads the same)."""


class Server:
    """An OpenAI-compatible server at `url`, which may end in /v1. Every call raises `UserError` when it fails."""

    def __init__(self, url: str, timeout: float, model: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"{url} is no address of a server; give one such as http://localhost:8000")
        self.timeout = timeout
        self.model = self._model(model)

    def _model(self, wanted: str | None) -> str:
        listed = self._call("/v1/models")
        try:
            names = [entry["id"] for entry in listed["data"]]
        except (KeyError, TypeError):
            raise UserError(f"{self.url}/v1/models lists no models; is this an OpenAI-compatible server?") from None
        wanted = names[0] if wanted is None and len(names) == 1 else wanted
        if wanted is None or wanted not in names:
            raise UserError(f"{self.url} serves {', '.join(names) or 'nothing'}; choose with --model")
        return wanted

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """The server's log-probability of every token given those before it; 0 for the first, NaN where it has none."""
        ids = [int(token) for token in tokens]
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        answer = self._call("/v1/completions", {"model": self.model, **body})
        try:
            listed = answer["choices"][0]["prompt_logprobs"]
            if len(listed) != len(ids):
                raise UserError(f"{self.url} answers for {len(listed)} tokens where {len(ids)} were asked for")
            found = [entry.get(str(token)) for token, entry in zip(ids[1:], listed[1:], strict=True)]
            return np.array([0.0] + [float("nan") if entry is None else float(entry["logprob"]) for entry in found])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.url} gives no prompt_logprobs; vLLM does, other servers may not have this extension"
            ) from None

    def tokenize(self, text: str) -> list[int]:
        """The server's tokens of a text, nothing added."""
        answer = self._call("/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})
        try:
            return [int(token) for token in answer["tokens"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.url}/tokenize gives no tokens; leave it out with --skip-tokenizer") from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise UserError(f"{self.url}{path} answers {error.code}: {_detail(error)}{_remedy(path, error)}") from None
        except TimeoutError:
            raise UserError(f"{self.url}{path} did not answer within {self.timeout:g} s; see --timeout") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise UserError(f"{self.url}{path} did not answer within {self.timeout:g} s; see --timeout") from None
            raise UserError(f"{self.url}{path} cannot be asked ({reason}); is the server up? vllm serve DIR") from None


def _detail(error: urllib.error.HTTPError) -> str:
    """The server's own words, in one line."""
    text = error.read(2000).decode(errors="replace")
    try:
        content = json.loads(text)
        text = content.get("message") or content.get("detail") or content["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return " ".join(str(text).split())[:300] or str(error.reason)


def _remedy(path: str, error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return f"; put the server's key into {KEY_VARIABLE}"
    if path == "/tokenize" and error.code in (404, 405):
        return "; leave the tokenizer out with --skip-tokenizer"
    return ""


@dataclass(frozen=True)
class Verdict:
    """How far the server is off, in nats, for each token of a prompt but the first, and what is wrong with that."""

    off: np.ndarray
    problem: str | None


def judge(golden: Golden, number: int, answered: np.ndarray, encoded: list[int] | None) -> Verdict:
    """Compares one prompt. `encoded`: the server's tokens of its text, None where it was not asked."""
    limits, off = golden.tolerance, np.abs(answered - golden.logprobs[number])[1:]
    problems = []
    if not np.isfinite(off).all():
        problems.append(f"no number for token {1 + int(np.argmin(np.isfinite(off)))}")
    elif off.max() > limits.largest:
        problems.append(f"a token is off by more than {limits.largest:.3f}")
    elif off.mean() > limits.mean:
        problems.append(f"off by more than {limits.mean:.3f} on average")
    if encoded is not None and encoded != golden.tokens[number].tolist():
        problems.append("another tokenizer: its tokens are not those of the text")
    return Verdict(off, "; ".join(problems) or None)


def check(server: Server, golden: Golden, tokenizer: bool = True) -> list[str]:
    """Asks for every prompt, printing a line for each; returns what is wrong. Raises `UserError` when the server cannot
    be asked."""
    problems, off = [], []
    for number, (text, tokens) in enumerate(zip(golden.texts, golden.tokens, strict=True)):
        encoded = server.tokenize(text) if tokenizer else None
        verdict = judge(golden, number, server.logprobs(tokens), encoded)
        off.append(verdict.off)
        worst = int(np.argmax(verdict.off))
        print(
            f"prompt {number}: {len(tokens)} tokens, largest difference {verdict.off[worst]:.4f} at token {worst + 1}, "
            f"mean {verdict.off.mean():.4f}: " + (f"FAILED, {verdict.problem}" if verdict.problem else "ok"),
            flush=True,
        )
        if verdict.problem:
            problems.append(f"prompt {number}: {verdict.problem}")
    overall, limit = float(np.concatenate(off).mean()), golden.tolerance.overall
    print(f"all prompts: mean difference {overall:.4f}, tolerance {limit:.4f}")
    if not overall <= limit:
        problems.append(f"all prompts are off by more than {limit:.3f} on average")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url", metavar="URL", help="of the server, such as http://localhost:8000")
    parser.add_argument("--golden", metavar="FILE", type=Path, required=True, help="what conversion/golden.py wrote")
    parser.add_argument("--model", metavar="NAME", help="name of the model there, if the server has several")
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=120.0, help="seconds for each answer (default: 120)"
    )
    parser.add_argument("--skip-tokenizer", action="store_true", help="for servers without /tokenize")
    args = parser.parse_args()
    if not args.timeout > 0:
        raise UserError(f"--timeout is {args.timeout}; give seconds above 0")
    golden = Golden.read(args.golden)
    server = Server(args.url, args.timeout, args.model)
    problems = check(server, golden, not args.skip_tokenizer)
    if problems:
        print(
            f"FAILED: {server.model} at {server.url} is not the model of {args.golden}, or is read wrongly: "
            f"{problems[-1]}. Check the folder that it serves with conversion/lint_export.py and conversion/certify.py"
        )
        return 1
    print(f"{server.model} at {server.url} answers as {args.golden} says, all {len(golden.texts)} prompts")
    return 0


if __name__ == "__main__":
    run(main)
