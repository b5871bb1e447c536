"""A stand-in for the Hugging Face hub, on loopback: folders served as repositories, for `hf download` and `datasets`.

    with serve_hub({"models/someone/model": folder, "datasets/someone/set": other}) as variables:
        subprocess.run(["hf", "download", "someone/model"], env=os.environ | variables)

Every repository has one commit, `COMMIT`, which `main` is a name of.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)
_API = re.compile(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class _Hub(BaseHTTPRequestHandler):
    repositories: Mapping[str, Path]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := _FILE.fullmatch(path):
            kind, name, revision, file = found.groups()
            return self._file(f"{kind or 'models/'}{name}", revision, file)
        found = _API.fullmatch(path)
        if not found or not (folder := self._folder(found[1], found[3] or "main")):
            return self._missing()
        if found[2] == "tree":
            return self._tree(folder, found[4])
        files = [{"rfilename": entry["path"]} for entry in _entries(folder) if entry["type"] == "file"]
        self._send({"id": found[1].split("/", 1)[1], "sha": COMMIT, "private": False, "siblings": files})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        found = _API.fullmatch(unquote(urlsplit(self.path).path))
        if not found or found[2] != "paths-info" or not (folder := self._folder(found[1], found[3])):
            return self._missing()
        self._send([entry for entry in _entries(folder) if entry["path"] in wanted])

    def _folder(self, name: str, revision: str) -> Path | None:
        return self.repositories.get(name) if revision in REVISIONS else None

    def _tree(self, folder: Path, under: str) -> None:
        if under and not (folder / under).is_dir():
            return self._missing()
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        inside = [
            entry
            for entry in _entries(folder)
            if Path(under) in Path(entry["path"]).parents and (deep or Path(entry["path"]).parent == Path(under))
        ]
        self._send(inside)

    def _file(self, name: str, revision: str, file: str) -> None:
        """A file, or the bytes of it that a Range asks for."""
        folder = self._folder(name, revision)
        if not folder or not (folder / file).is_file():
            return self._missing()
        content = (folder / file).read_bytes()
        headers = {"ETag": f'"{_sha1(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(content[first : last + 1], headers, 206)

    def _missing(self) -> None:
        self._send({"error": "Not found"}, {"X-Error-Code": "EntryNotFound"}, 404)

    def _send(self, content: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_words: Any) -> None:
        """Nothing: a request is no news."""


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The files and folders of a repository as the hub lists them."""
    return [
        {"type": "directory", "path": str(path.relative_to(folder)), "size": 0, "oid": _sha1(str(path).encode())}
        if path.is_dir()
        else {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size,
              "oid": _sha1(path.read_bytes())}
        for path in sorted(folder.rglob("*"))
    ]  # fmt: skip


@contextmanager
def serve_hub(repositories: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """Serves `models/OWNER/NAME` and `datasets/OWNER/NAME` from folders; gives the environment that leads there."""
    handler = type("Hub", (_Hub,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # which would ask PyPI
        }
    finally:
        server.shutdown()
        server.server_close()
