"""The lock on a file: one process at a time, and a note where the file system has no locks that everybody sees."""

from __future__ import annotations

import errno
import multiprocessing
import os

import pytest

from nano3 import file_system
from nano3.cli import UserError
from nano3.file_system import Mount
from nano3.outputs import alone


def test_the_second_is_refused_until_the_first_has_left(tmp_path, capsys):
    with alone(tmp_path, ""), pytest.raises(UserError, match=r"^wait$"), alone(tmp_path, "wait"):
        pass
    with alone(tmp_path, "wait"):
        pass
    assert capsys.readouterr().err == ""


def test_a_helper_that_was_forked_meanwhile_does_not_keep_it(tmp_path):
    with file_system.locked(tmp_path / "lock", remove=True) as mine:
        assert mine
        helper = multiprocessing.get_context("fork").Process(target=lambda: __import__("time").sleep(60))
        helper.start()
    assert not (tmp_path / "lock").exists()
    try:
        with file_system.locked(tmp_path / "lock") as mine:
            assert mine
    finally:
        helper.kill()
        helper.join()


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, capsys):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(file_system.fcntl, "flock", flock)
    with alone(tmp_path, "wait"):
        pass
    assert "cannot be locked (Function not implemented): see to it" in capsys.readouterr().err


def test_a_lock_that_other_hosts_do_not_see_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(file_system, "mount_of", lambda _: Mount("/", "lustre", "mgs:/fs", ("rw", "localflock")))
    with alone(tmp_path, "wait"):
        pass
    assert f"{tmp_path} is locked on this host only (mounted with localflock)" in capsys.readouterr().err
