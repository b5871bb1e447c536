"""Asking a server: only http and https, a deadline for the whole answer, no more of it than is declared, no redirects.

A server that drips a byte a second never lets a socket time out; one that redirects would have the key sent elsewhere.
Proxies of the environment are not used: what is asked here is a server of one's own.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from email.message import Message
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from nano3.documents import MAX_BYTES
from nano3.errors import UserError

T = TypeVar("T")

_REDIRECTS = range(300, 400)


class Answer(NamedTuple):
    """A server's answer: status, its reason in words, the body, and the headers."""

    status: int
    reason: str
    body: bytes
    headers: Message


def check_address(url: str) -> str:
    """The address of a server. Raises `UserError` for another scheme than http and https, and for a key inside it."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(f"{url} is no address of a server; give one such as http://localhost:8000")
    if parts.username is not None or parts.password is not None:
        raise UserError("the address of the server holds a name or password; give the address without it")
    return url


def ask(url: str, headers: dict[str, str], body: bytes | None, seconds: float) -> Answer:
    """What a server answers: GET, or POST where there is a body.

    Raises:
        UserError: a redirect, or more than `MAX_BYTES`.
        TimeoutError: no whole answer within `seconds`.
        OSError, http.client.HTTPException: it cannot be reached, speaks something else, or sends less than it said.
    """
    parts = urlsplit(check_address(url))
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)

    def exchange() -> Answer:
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request("GET" if body is None else "POST", path or "/", body, headers)
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            raise UserError(
                f"{url} redirects to {(response.headers.get('Location') or 'nowhere')[:200]!r}; give the address that "
                "is meant, nothing is sent on"
            )
        content = response.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{url} answers with more than {MAX_BYTES >> 20} MiB; is this the server that is meant?")
        if response.length:  # what is left of the announced bytes
            raise http.client.IncompleteRead(content, response.length)
        return Answer(response.status, response.reason, content, response.headers)

    try:
        return within(seconds, exchange)
    finally:
        connection.close()


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; `TimeoutError` when it takes longer. It then goes on, unheard, until it ends."""
    result: list[Any] = []

    def work() -> None:
        try:
            result.append((True, call()))
        except BaseException as error:
            result.append((False, error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    if not result:
        raise TimeoutError
    good, value = result[0]
    if good:
        return value
    raise value


def without(secret: str | None, text: str) -> str:
    """The text with a secret, wherever it stands in it, left out."""
    return text.replace(secret, "***") if secret else text
