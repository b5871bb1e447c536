"""Asks a running vLLM what conversion/golden.py computed: the first thing to run after a deployment.

    python conversion/check_server.py http://localhost:8000 --golden FP8.golden.safetensors

Sends every prompt as token ids to /v1/completions and compares the log-probabilities of its tokens; sends its text to
/tokenize and compares the ids. Prints the largest difference of each prompt, how near the answers are to those of an
unquantized model, and what a pass does not show. Where the server says which folder it serves, and that folder is on
this machine, its content hash is compared too. Exit code 0 when all is within the file's limits, 1 when the server
answers something else, 2 when it cannot be asked.

What is asked and read is vLLM's extension of OpenAI's completions: `prompt_logprobs` of the request, and of a choice in
the response a list with null for the first token and {token id: {logprob, rank, decoded_token}} for each other
(vllm/entrypoints/openai/completion/protocol.py, vllm/entrypoints/serve/tokenize/protocol.py, as of November 2026).
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
import http.client
import json
import os
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import numpy as np
from annotated_types import MinLen
from typing_extensions import TypedDict

from conversion.fp8.golden_file import Golden
from conversion.fp8.golden_verdict import Limits, of_all, of_prompt, unseen, way
from nano3.documents import Count, Name, Sha256, Text, parse_json
from nano3.network import Answer, ask, check_address, without

T = TypeVar("T")

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable whose value, if any, is sent as the server's key (vLLM reads the same)."""


class Model(TypedDict):
    """A model that a server lists. vLLM gives the folder or name that it was started with as `root`; a content hash is
    nobody's usage yet, and is compared where there is one."""

    id: Name
    root: NotRequired[Text | None]
    model_sha256: NotRequired[Sha256]


class Models(TypedDict):
    """The answer of /v1/models."""

    data: list[Model]


class LogProb(TypedDict):
    """What a token got; -inf is a number here."""

    logprob: float


class Choice(TypedDict):
    """An answer of the model, with vLLM's extension."""

    prompt_logprobs: list[dict[str, LogProb | None] | None]


class Completion(TypedDict):
    """The answer of /v1/completions."""

    choices: Annotated[list[Choice], MinLen(1)]


class Tokens(TypedDict):
    """The answer of /tokenize."""

    tokens: list[Count]


class Server:
    """An OpenAI-compatible server at `url`, which may end in /v1. Every call raises `UserError` when it fails."""

    def __init__(self, url: str, timeout: float, model: str | None = None) -> None:
        self.url = check_address(url).rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self.listed = self._model(model)
        self.model = self.listed["id"]

    def _model(self, wanted: str | None) -> Model:
        models = self._call("/v1/models", Models, "is this an OpenAI-compatible server?")["data"]
        wanted = models[0]["id"] if wanted is None and len(models) == 1 else wanted
        found = [entry for entry in models if entry["id"] == wanted]
        if not found:
            names = ", ".join(entry["id"] for entry in models[:20])
            raise UserError(f"{self.url} serves {names or 'nothing'}; choose with --model")
        return found[0]

    def model_sha256(self) -> str | None:
        """The content hash of what it serves: its own word, or that of its folder where that is on this machine."""
        root = Path(self.listed.get("root") or "")
        if "model_sha256" in self.listed or not (root / "config.json").is_file():
            return self.listed.get("model_sha256")
        from conversion.identity import model_sha256

        return model_sha256(root)

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """The server's log-probability of every token given those before it; 0 for the first, NaN where it has none."""
        ids = [int(token) for token in tokens]
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        why = "vLLM gives prompt_logprobs, other servers may not have this extension"
        answer = self._call("/v1/completions", Completion, why, {"model": self.model, **body})
        listed = answer["choices"][0]["prompt_logprobs"]
        if len(listed) != len(ids):
            raise UserError(f"{self.url} answers for {len(listed)} tokens where {len(ids)} were asked for")
        found = [(entry or {}).get(str(token)) for token, entry in zip(ids[1:], listed[1:], strict=True)]
        return np.array([0.0] + [float("nan") if entry is None else float(entry["logprob"]) for entry in found])

    def tokenize(self, text: str) -> list[int]:
        """The server's tokens of a text, nothing added."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return self._call("/tokenize", Tokens, "leave it out with --skip-tokenizer", body)["tokens"]

    def _call(self, path: str, schema: type[T], remedy: str, body: dict[str, Any] | None = None) -> T:
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        where = self.url + path
        try:
            answer = ask(where, headers, None if body is None else json.dumps(body).encode(), self.timeout)
        except TimeoutError:
            raise UserError(f"{where} did not answer within {self.timeout:g} s; see --timeout") from None
        except UserError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = without(key, str(error) or type(error).__name__)
            raise UserError(f"{where} cannot be asked ({reason}); is the server up? vllm serve DIR") from None
        if answer.status != 200:
            detail = without(key, _detail(answer))
            raise UserError(f"{where} answers {answer.status}: {detail}{_remedy(path, answer.status)}")
        return parse_json(answer.body, schema, where, remedy)


def _detail(answer: Answer) -> str:
    """The server's own words, in one line."""
    text = answer.body[:2000].decode(errors="replace")
    try:
        told = parse_json(answer.body, dict[str, Any], "the answer")
        inside = told.get("error")
        text = told.get("message") or told.get("detail") or (inside["message"] if isinstance(inside, dict) else text)
    except (UserError, KeyError):
        pass
    return " ".join(str(text).split())[:300] or answer.reason


def _remedy(path: str, status: int) -> str:
    if status in (401, 403):
        return f"; put the server's key into {KEY_VARIABLE}"
    if path == "/tokenize" and status in (404, 405):
        return "; leave the tokenizer out with --skip-tokenizer"
    return ""


def check(server: Server, golden: Golden, tokenizer: bool = True) -> list[str]:
    """Asks for every prompt, printing a line for each; returns what is wrong. Raises `UserError` when the server cannot
    be asked."""
    problems, answered, limits = _of_hash(server, golden), [], Limits.of(golden)
    for number, (text, tokens) in enumerate(zip(golden.texts, golden.tokens, strict=True)):
        other = tokenizer and server.tokenize(text) != tokens.tolist()
        found = server.logprobs(tokens)
        off = np.abs(found - golden.logprobs[number])[1:]
        wrong = [problem] if (problem := of_prompt(golden, number, found, limits)) else []
        wrong += ["another tokenizer: its tokens are not those of the text"] if other else []
        print(
            f"prompt {number}: {len(tokens)} tokens, largest difference {off.max():.4f} at token "
            f"{1 + int(np.argmax(off))}, mean {off.mean():.4f}: {'FAILED, ' + '; '.join(wrong) if wrong else 'ok'}",
            flush=True,
        )
        answered.append(found)
        problems += [f"prompt {number}: {'; '.join(wrong)}"] if wrong else []
    _print_all(golden, answered, limits)
    return problems + of_all(golden, answered, limits)


def _of_hash(server: Server, golden: Golden) -> list[str]:
    """Whether the server has the weights of the file, where that can be known."""
    found, expected = server.model_sha256(), golden.facts["model_sha256"]
    if found is None:
        print("hash: the server gives none, and its folder is not on this machine")
        return []
    print(f"hash: {found[:16]}, {'that of the golden answers' if found == expected else 'FAILED'}")
    if found == expected:
        return []
    return [f"it serves a model of content hash {found[:16]}, the golden answers are of {expected[:16]}"]


def _print_all(golden: Golden, answered: list[np.ndarray], limits: Limits) -> None:
    off = np.concatenate([np.abs(a - b)[1:] for a, b in zip(answered, golden.logprobs, strict=True)])
    print(f"all prompts: mean difference {off.mean():.4f}, limit {limits.overall:.4f}")
    for name, limit in limits.ways.items():
        told = f"limit {limit:.0%}" if limit <= 1 else "these prompts cannot tell"
        print(f"towards a model with {name}: {way(golden, answered, name):.0%} of the way, {told}")


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
    print(f"this does not show: {'; '.join(unseen(golden))}")
    return 0


if __name__ == "__main__":
    run(main)
