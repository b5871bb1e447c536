"""conversion/push.py against a Hub of our own on this machine: what is uploaded, and what is refused before."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from conversion import merge_lora
from conversion.merge_lora import merge
from conversion.push import Hub, main
from nano3.cli import UserError
from nano3.sealed_folder import MARKER, SEAL
from tests.conversion.test_merge import write_adapter
from tests.helpers.tiny import tiny_hf_folder

NAME = "someone/merged"


class FakeHub(BaseHTTPRequestHandler):
    """The calls of huggingface_hub that an upload makes. Files come inside the commit."""

    repositories: dict[str, dict[str, Any]]
    """Name -> private, files."""

    def do_GET(self) -> None:
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if name not in self.repositories:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        found = self.repositories[name]
        files = [{"rfilename": file, "type": "file", "path": file, "size": 1, "oid": "0"} for file in found["files"]]
        if "/tree/" in self.path:
            return self.answer(200, files)
        return self.answer(200, {"id": name, "private": found["private"], "siblings": files, "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.body()
        if self.headers["Authorization"] != "Bearer good":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            self.repositories[name] = {"private": told["visibility"] == "private", "files": {}}
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self.answer(200, {"files": modes})
        files = self.repositories[name]["files"]
        for line in body.decode().splitlines():
            value = json.loads(line)
            if value["key"] == "file":
                files[value["value"]["path"]] = base64.b64decode(value["value"]["content"])
            if value["key"] == "deletedFile":
                del files[value["value"]["path"]]
        address = f"http://{self.headers['Host']}/{name}/commit/{'1' * 40}"
        return self.answer(200, {"commitUrl": address, "commitOid": "1" * 40})

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):  # Transfer-Encoding: chunked
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The repositories of a Hub that huggingface_hub talks to, with a token that it knows."""
    repositories: dict[str, Any] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (FakeHub,), {"repositories": repositories}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "good")
    yield repositories
    server.shutdown()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    tiny_hf_folder(folder / "base", shards=2)
    (folder / "base/README.md").write_text("---\nlicense: other\nlicense_name: some-terms\n---\n# The base\n")
    merge(folder / "base", write_adapter(folder / "adapter"), folder / "merged")
    return folder / "merged"


def test_an_upload_is_the_folder_with_the_card_as_readme(hub, merged, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["push.py", str(merged), NAME])
    assert main() == 0
    assert capsys.readouterr().out == f"{constants.ENDPOINT}/{NAME}/commit/{'1' * 40}\n"
    assert hub[NAME]["private"] is True
    expected = {path.name: path.read_bytes() for path in merged.iterdir() if path.name not in (MARKER, SEAL)}
    expected["README.md"] = expected.pop("model_card.md")
    assert hub[NAME]["files"] == expected
    assert expected["README.md"].startswith(b"---\nlicense: other\nlicense_name: some-terms\n")
    # Again: what another layout left there would make the folder unreadable.
    hub[NAME]["files"] |= {"model-00003-of-00003.safetensors": b"stale", "notes.txt": b"kept"}
    hub[NAME]["files"] |= {"hf_quant_config.json": b"of an FP8 model that lay there", "adapter_model.bin": b"stale"}
    Hub(NAME).upload(merged)
    assert hub[NAME]["files"] == expected | {"notes.txt": b"kept"}


def test_what_was_altered_is_not_uploaded(hub, merged, tmp_path):
    shutil.copytree(merged, tmp_path / "copy")
    (tmp_path / "copy/config.json").write_text((merged / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"not uploaded, it is not what .* config\.json is not"):
        Hub(NAME).upload(tmp_path / "copy")
    with pytest.raises(UserError, match=r"has no certificate\.json"):
        Hub(NAME).upload(merged.parent / "base")
    assert hub == {}


def test_a_public_repository_must_be_meant(hub, merged):
    hub[NAME] = {"private": False, "files": {}}
    with pytest.raises(UserError, match="is public; choose another name, or say --public"):
        Hub(NAME)
    assert "certificate.json" not in hub[NAME]["files"]
    Hub(NAME, public=True).upload(merged)
    assert "certificate.json" in hub[NAME]["files"]
    Hub("someone/new", public=True).upload(merged)
    assert hub["someone/new"]["private"] is False


def test_what_cannot_work_is_said_at_once(hub, merged, monkeypatch):
    with pytest.raises(UserError, match="give ORGANIZATION/NAME"):
        Hub("merged")
    with pytest.raises(UserError, match="cannot validate some one/merged"):
        Hub("some one/merged")
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(UserError, match=r"cannot create someone/merged on the Hub: .*401"):
        Hub(NAME).upload(merged)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the Hugging Face Hub: `hf auth login`"):
        Hub(NAME)
    assert hub == {}


def test_a_merge_uploads_what_it_made_and_asks_before_it_starts(hub, merged, tmp_path, monkeypatch, capsys):
    command = ["merge_lora.py", str(merged.parent / "base"), str(merged.parent / "adapter"), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--push", "nobody"])
    with pytest.raises(UserError, match="give ORGANIZATION/NAME"):
        merge_lora.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", [*command, "--push", NAME])
    assert merge_lora.main() == 0
    assert f"/{NAME}/commit/" in capsys.readouterr().out
    assert hub[NAME]["files"]["config.json"] == (tmp_path / "out/config.json").read_bytes()


def test_the_hub_has_a_deadline_and_the_token_stands_in_no_message(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub = object.__new__(Hub)
    hub.repository = NAME

    def refuse() -> None:
        raise ValueError("wrong token hf_secret\nin the header")

    with pytest.raises(UserError, match=r"cannot read someone/merged on the Hub: wrong token \*\*\* in the header"):
        hub._ask("read", refuse)
    with pytest.raises(UserError, match="cannot read someone/merged: no answer of the Hub in 0 s"):
        hub._ask("read", threading.Event().wait, 2, seconds=0.05)


@pytest.mark.parametrize(
    ("headers", "size", "reason"),
    [
        ({}, 17 << 20, "answers with more than 16 MiB"),
        ({"Content-Encoding": "gzip"}, 100, "answers in the form 'gzip', not asked for"),
    ],
    ids=["large", "compressed"],
)
def test_an_answer_of_the_hub_is_bounded(hub, monkeypatch, headers, size, reason):
    def answer(self: FakeHub) -> None:
        FakeHub.answer(self, 200, {"id": NAME, "private": True, "siblings": [], "sha": "a" * size}, headers)

    hub[NAME] = {"private": True, "files": {}}
    monkeypatch.setattr(FakeHub, "do_GET", answer)
    with pytest.raises(UserError, match=reason):
        Hub(NAME)
