"""Servers that drip, flood, redirect or misspeak: one refusal, in time, and the key goes nowhere else."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from conversion.check_server import KEY_VARIABLE, Server
from nano3.cli import UserError
from nano3.network import ask, check_address, within, without

KEY = "sk-secret"


@contextmanager
def serve(answer: Any) -> Iterator[tuple[str, list[str]]]:
    """A server on the loopback interface that answers with `answer(handler)`; its address and the keys that it saw."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(str(self.headers.get("Authorization")))
            answer(self)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", keys
    finally:
        server.shutdown()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    """A whole answer."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A blank every 50 ms, for 20 s."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(400):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


def test_a_server_that_drips_is_given_up(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with serve(drip) as (url, _), pytest.raises(UserError, match=r"did not answer within 0\.5 s"):
        Server(url, 0.5)


def test_a_redirect_is_told_and_not_followed(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with serve(lambda handler: reply(handler, b'{"data": [{"id": "m"}]}')) as (other, stolen):
        for status in (301, 302, 307, 308):
            with serve(lambda handler, s=status: reply(handler, b"", s, Location=f"{other}/x")) as (url, keys):
                with pytest.raises(UserError, match=r"redirects to .*; give the address that is meant"):
                    Server(url, 5)
                assert keys == [f"Bearer {KEY}"]
    assert stolen == []


def test_an_answer_of_fewer_bytes_than_were_announced_is_none():
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "9")
        handler.end_headers()
        handler.wfile.write(b"half")

    with serve(short) as (url, _), pytest.raises(http.client.IncompleteRead, match="4 bytes read, 5 more"):
        ask(url, {}, None, 5)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[" * 200_000, "nested deeper than 64"),
        (b" " * ((16 << 20) + 1), "more than 16 MiB"),
        (b'{"data": [{"id": 5}]}', r"data\[0\]\.id is 5; it must be a valid string"),
        (b'{"data": {}}', "data is {}; it must be a valid list"),
        (b"\xff", "not UTF-8 text"),
        (b"", "not valid JSON"),
    ],
)
def test_an_answer_that_is_none_is_refused(body, says):
    with serve(lambda handler: reply(handler, body)) as (url, _), pytest.raises(UserError, match=says):
        Server(url, 20)


def test_the_key_stands_in_no_message(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    told = b'{"message": "wrong key ' + KEY.encode() + b'"}'
    with serve(lambda handler: reply(handler, told, 401)) as (url, _), pytest.raises(UserError) as error:
        Server(url, 5)
    assert "answers 401: wrong key ***; put the server's key into VLLM_API_KEY" in str(error.value)
    assert without(KEY, f"a {KEY} b") == "a *** b"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x", "localhost:8000", "http://", "http://a b", "http://x:99999"]
)
def test_other_addresses_are_refused(url):
    with pytest.raises(UserError, match="no address of a server"):
        check_address(url)


def test_a_key_inside_the_address_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="holds a name or password") as error:
        ask("http://user:hunter2@127.0.0.1/", {}, None, 1)
    assert "hunter2" not in str(error.value)


def test_within_gives_back_what_the_call_gives_or_raises():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(1))
