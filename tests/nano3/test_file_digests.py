"""What is remembered of files, and when it is not believed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from nano3 import file_digests
from nano3.cli import UserError
from nano3.file_digests import recall, remember, remembered_sha256, stamp
from nano3.file_system import Mount
from nano3.sealed_folder import SEAL, check_seal, require_inside, seal
from tests.helpers.damage import change_keeping_size_and_time

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, in a cache of this test, where no file is too small or too new."""
    monkeypatch.setenv("NANO3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "SMALL_BYTES", 0)
    monkeypatch.setattr(file_digests, "RECENT_NS", 0)
    read: list[str] = []
    really = file_digests._hash

    def count(path: Path, bar: object) -> str:
        read.append(path.name)
        return really(path, bar)

    monkeypatch.setattr(file_digests, "_hash", count)
    return read


def made(path: Path) -> Path:
    path.write_bytes(CONTENT)
    time.sleep(0.02)  # past the tick of the kernel's clock
    return path


def test_a_file_is_read_once_until_it_changes(tmp_path, reads):
    file = made(tmp_path / "file")
    expected = {file: hashlib.sha256(CONTENT).hexdigest()}
    assert remembered_sha256([file]) == remembered_sha256([file]) == expected
    assert reads == ["file"]
    change_keeping_size_and_time(file)
    assert remembered_sha256([file]) != expected
    assert reads == ["file"] * 2
    os.replace(made(tmp_path / "other"), file)  # another file under its name, as every copying tool leaves it
    os.utime(file, ns=(0, 0))
    assert remembered_sha256([file]) == expected
    assert reads[2:] == ["file"]


def test_what_just_changed_or_lies_in_the_future_is_read_each_time(tmp_path, reads, monkeypatch):
    """It could change again within the same tick of the clock; a clock that was set back comes there once more."""
    file = made(tmp_path / "file")
    monkeypatch.setattr(file_digests, "RECENT_NS", 3 * 10**9)
    remembered_sha256([file])
    remembered_sha256([file])
    assert reads == ["file"] * 2
    monkeypatch.setattr(file_digests, "RECENT_NS", 0)
    os.utime(file, ns=(0, time.time_ns() + 10**12))
    remembered_sha256([file])
    remembered_sha256([file])
    assert reads == ["file"] * 4


@pytest.mark.parametrize("kind", ["vfat", "cifs", "fuse.sshfs"])
def test_file_systems_without_a_ctime_of_the_kernel_are_read_each_time(tmp_path, reads, monkeypatch, kind):
    monkeypatch.setattr(file_digests, "mount_of", lambda _: Mount("/", kind, "x", ()))
    file = made(tmp_path / "file")
    remembered_sha256([file])
    remembered_sha256([file])
    assert reads == ["file"] * 2


def test_a_server_s_file_is_known_on_every_host_and_a_disk_s_on_this_one_only(tmp_path, reads, monkeypatch):
    file = made(tmp_path / "file")
    here = stamp(file)
    monkeypatch.setattr(file_digests, "_boot", lambda: "another machine")
    assert stamp(file)[0] != here[0]
    monkeypatch.setattr(file_digests, "mount_of", lambda _: Mount("/data", "nfs4", "server:/data", ()))
    there = stamp(file)
    assert there == ("nfs4 server:/data", *here[1:])
    del reads


def test_a_cache_that_others_may_write_to_is_not_believed(tmp_path, reads):
    file = made(tmp_path / "file")
    remembered_sha256([file])
    (tmp_path / "cache/digests").chmod(0o777)
    remembered_sha256([file])
    assert reads == ["file"] * 2


def test_a_wrong_memory_refuses_no_good_file(tmp_path, reads):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = made(folder / "file")
    seal(folder)
    (entry,) = (tmp_path / "cache/digests").iterdir()
    entry.write_text('"0000"')
    check_seal(folder)
    assert reads == ["file", "file"]
    assert file.read_bytes() == CONTENT


def test_a_file_that_changed_while_it_was_read_is_not_remembered(tmp_path, reads):
    file = made(tmp_path / "file")
    before = [stamp(file)]
    change_keeping_size_and_time(file)
    remember("fact", [file], before, time.time_ns(), True)
    assert recall("fact", [file]) is None
    remember("fact", [file], [stamp(file)], time.time_ns() + 10**9, True)
    assert recall("fact", [file]) is True
    del reads


def test_a_seal_speaks_of_every_file_but_prose_and_folders_with_one_of_their_own(tmp_path):
    for name in ("a", "sub/.hidden", "README.md", "inner/nano3.json", "inner/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    seal(tmp_path)
    for name, listed in (("a", True), ("sub/.hidden", True), ("README.md", False), ("inner/b", False)):
        (tmp_path / name).write_text("TEXT")
        if listed:
            with pytest.raises(
                UserError, match=rf"{name} is not what was written: its SHA-256 .*copy the folder again"
            ):
                check_seal(tmp_path)
        (tmp_path / name).write_text("text")
        check_seal(tmp_path)
    (tmp_path / "later").write_text("what came later is no part of it")
    check_seal(tmp_path)
    (tmp_path / SEAL).unlink()
    check_seal(tmp_path)  # other tools' folders have none
    with pytest.raises(UserError, match=r"files\.json, which says what the folder holds, is missing"):
        check_seal(tmp_path, required=True)


def test_links_out_of_a_folder_are_refused_but_those_of_hugging_face_s_cache(tmp_path):
    (tmp_path / "secret").write_text("key")
    model = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    for folder in (model, blobs):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("blob")
    (model / "config.json").symlink_to("../../blobs/abc")
    (model / "inside").symlink_to("config.json")
    (model / "out").symlink_to("../../../secret")
    for name in ("config.json", "inside"):
        require_inside(model, model / name)
    with pytest.raises(UserError, match=r"out is a link to .*secret, outside of .*put the file itself there"):
        require_inside(model, model / "out")
    with pytest.raises(UserError, match="out is a link to"):
        check_seal(model)  # what every reader of a folder does first, whoever wrote it
    (model / "out").unlink()
    os.mkfifo(model / "out")
    with pytest.raises(UserError, match="out is no plain file"):
        check_seal(model)  # a pipe, which would never end
    (model / "out").unlink()
    (model / ".git").mkdir()
    (model / ".git/out").symlink_to(tmp_path / "secret")
    check_seal(model)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").symlink_to(blobs / "abc")
    with pytest.raises(UserError, match="is a link to"):
        require_inside(plain, plain / "config.json")
    (tmp_path / "alias").symlink_to(model)  # the folder itself may be a link
    require_inside(tmp_path / "alias", tmp_path / "alias" / "config.json")
