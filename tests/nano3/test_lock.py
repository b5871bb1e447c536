"""The lock on a folder: one process at a time, and none at all where the file system has no locks."""

from __future__ import annotations

import errno
import os

import pytest

from nano3 import lock
from nano3.cli import UserError


def test_the_second_is_refused_until_the_first_has_left(tmp_path, capsys):
    with lock.alone(tmp_path, ""), pytest.raises(UserError, match=r"^wait$"), lock.alone(tmp_path, "wait"):
        pass
    with lock.alone(tmp_path, "wait"):
        pass
    assert capsys.readouterr().err == ""


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, capsys):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.alone(tmp_path, "wait"):
        pass
    assert "cannot be locked (Function not implemented): see to it" in capsys.readouterr().err
