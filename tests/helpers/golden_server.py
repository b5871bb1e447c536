"""A server on loopback that answers as vLLM's does, from a reference model: for tests of conversion/check_server.py."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class FakeServer:
    """What is served: a transformers model, a tokenizer, and how the answers are spoilt."""

    def __init__(self, model: Any, tokenizer: Any, names: tuple[str, ...] = ("fp8",)) -> None:
        self.model, self.tokenizer, self.names = model, tokenizer, names
        self.delay, self.without, self.missing = 0.0, False, ""
        self.card: dict[str, Any] = {}
        """What /v1/models says of each model besides."""
        self.asked: list[tuple[str, Any]] = []

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and content of the response; `body` is None for GET."""
        self.asked.append((path, body))
        time.sleep(self.delay)
        if path == self.missing:
            return 404, {"detail": "Not Found"}
        if path == "/v1/models":
            return 200, {
                "object": "list",
                "data": [{"id": name, "object": "model", **self.card} for name in self.names],
            }
        if body["model"] not in self.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        if path == "/tokenize":
            tokens = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return 200, {"tokens": tokens, "count": len(tokens), "max_model_len": 4096}
        choice = {"index": 0, "text": "?", "finish_reason": "length", "prompt_logprobs": self.logprobs(body)}
        return 200, {"object": "text_completion", "model": body["model"], "choices": [choice]}

    def logprobs(self, body: Any) -> Any:
        """As vLLM: null, then for each token its own entry and those of the most likely ones."""
        if self.without:
            return None
        tokens = torch.tensor(body["prompt"])
        with torch.no_grad():
            found = self.model(tokens[None]).logits[0].float().log_softmax(-1)
        result: list[Any] = [None]
        for row, token in zip(found[:-1], tokens[1:].tolist(), strict=True):
            listed = {token, *row.topk(body["prompt_logprobs"]).indices.tolist()}
            result.append({str(key): {"logprob": float(row[key]), "rank": 1, "decoded_token": "?"} for key in listed})
        return result


@contextmanager
def serve(fake: FakeServer) -> Iterator[str]:
    """Serves on a free port of loopback; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: Any) -> None:
            status, content = fake.answer(self.path, body)
            data = json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:  # who asked has given up
                pass

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
