"""Output folders and files that appear whole or not at all, whatever is killed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from nano3 import outputs
from nano3.errors import UserError
from nano3.file_system import is_transient, remove_folder
from nano3.outputs import alone, claim, fresh_file, fresh_output, put_back, scratch_folder
from nano3.sealed_folder import check_seal, is_ours, mark, owner_of, seal
from tests.helpers.killed import at_every_change


def write(out, text):
    with fresh_output(out, "test") as folder:
        (folder / "result").write_text(text)


def again(source, target):
    """Makes a folder what another one is."""
    shutil.rmtree(target)
    shutil.copytree(source, target)


def hidden(out):
    return sorted(path.name for path in out.parent.glob(".*"))


def test_a_result_is_replaced_whole_and_marked_as_ours(tmp_path):
    out = tmp_path / "out"
    for text in ("old", "new"):
        write(out, text)
        assert (out / "result").read_text() == text
    assert owner_of(out) == "test"
    assert json.loads((out / "nano3.json").read_text())["kind"] == "test"
    assert hidden(out) == []


def test_an_error_leaves_the_old_result_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(TypeError, match="str"):
        write(out, 1 / 2)  # the folder is made, the text is none
    assert (out / "result").read_text() == "old"
    assert hidden(out) == []


def test_a_failed_rename_puts_the_old_result_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "old")
    rename = os.rename

    def fails_once(source, target):
        if ".partial-" in str(source):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(OSError, match="no"):
        write(out, "new")
    assert (out / "result").read_text() == "old"
    assert hidden(out) == []


def test_what_a_killed_run_left_is_put_back_or_removed(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    os.rename(out, tmp_path / ".out.old-1-00000000")  # killed between two renames
    (tmp_path / ".out.partial-1-00000000").mkdir()
    (tmp_path / ".out.lock").touch()
    with pytest.raises(TypeError, match="str"):
        write(out, 1 / 2)
    assert (out / "result").read_text() == "old"
    assert hidden(out) == []


def test_killed_at_every_change_of_the_disk_the_next_run_leaves_nothing(tmp_path):
    out, moments = tmp_path / "out", []

    def new():
        with fresh_output(out, "test") as folder:
            (folder / "inner").mkdir()
            for name in ("result", "a", "inner/z"):
                (folder / name).write_text("new")

    write(out, "old")
    for event in at_every_change(new, tmp_path):
        there = [path for path in tmp_path.iterdir() if (path / "result").exists() and (path / "files.json").exists()]
        assert out in there or any(path.name.startswith(".out.old-") for path in there), event
        with pytest.raises(TypeError, match="str"):  # who fails puts back what was there
            write(out, 1 / 2)
        assert hidden(out) == [], event
        assert (out / "result").read_text() in ("old", "new"), event
        check_seal(out, required=True)
        moments.append(event)
        shutil.rmtree(out)
        write(out, "old")
    assert len(moments) > 25


def test_what_puts_back_and_clears_away_may_be_killed_too(tmp_path):
    """At every change that it makes, for every change at which the run before was killed."""
    work, kept = tmp_path / "work", tmp_path / "kept"
    out, moments = work / "out", []
    work.mkdir()
    write(out, "old")
    shutil.copytree(work, kept)
    for _ in at_every_change(lambda: write(out, "new"), work):
        shutil.copytree(work, tmp_path / "killed")
        for event in at_every_change(lambda: put_back(out), work):
            put_back(out)
            assert os.listdir(work) == ["out"], event
            check_seal(out, required=True)
            moments.append(event)
            again(tmp_path / "killed", work)
        shutil.rmtree(tmp_path / "killed")
        again(kept, work)
    assert len(moments) > 100


def test_what_a_removal_that_was_killed_left_is_not_put_back(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    for event in at_every_change(lambda: write(out, "new"), tmp_path):
        if event.startswith("os.remove"):  # the new one has its name, and the first file of the old one is about to go
            break
        write(out, "old")
    assert (out / "result").read_text() == "new"
    shutil.rmtree(out)
    with pytest.raises(TypeError, match="str"):
        write(out, 1 / 2)
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_output_exclude_each_other_whatever_their_process_numbers(tmp_path):
    """In another container the writer may have our number, or one that nobody has here."""
    out = tmp_path / "out"
    with fresh_output(out, "test") as folder:
        (folder / "result").write_text("first")
        for second in (lambda: write(out, "second"), lambda: fresh_file(out).__enter__()):
            with pytest.raises(UserError, match=r"another process is writing .*out; wait for it"):
                second()
        assert [path.name for path in folder.iterdir()] == ["nano3.json", "result"]
    assert (out / "result").read_text() == "first"
    assert hidden(out) == []


@pytest.mark.parametrize("name", ["?", "*", "[a]", "a"])
def test_names_are_no_patterns_and_what_is_another_output_s_or_somebody_s_stays(tmp_path, name):
    others = [
        ".a.partial-1-00000000",
        ".b.old-1-00000000",
        f".{name}.partial-1-notours",
        f".{name}.kept.partial-1-00000000",
    ]
    for other in others if name != "a" else others[1:]:
        (tmp_path / other).mkdir()
        (tmp_path / other / "file").write_text("theirs")
    (tmp_path / f".{name}.partial-2-00000000").mkdir()
    (tmp_path / f".{name}.partial-2-00000000" / "thesis").write_text("no tool of ours left this")
    write(tmp_path / name, "text")
    left = set(others if name != "a" else others[1:]) | {f".{name}.partial-2-00000000"}
    assert set(hidden(tmp_path / name)) == left


@pytest.mark.parametrize("make", ["file", "stranger", "other kind", "later"])
def test_what_is_not_ours_is_refused_and_kept(tmp_path, make):
    out = tmp_path / "out"
    if make == "file":
        out.write_text("mine")
    elif make == "stranger":
        out.mkdir()
        (out / "thesis").write_text("mine")
    elif make == "later":
        write(out, "old")
        (out / "thesis").write_text("mine")
    else:
        with fresh_output(out, "another") as folder:
            (folder / "thesis").write_text("mine")
    with pytest.raises(UserError, match="out"):
        write(out, "new")
    assert (out if make == "file" else out / "thesis").read_text() == "mine"


def test_a_folder_that_grows_is_claimed_where_it_is(tmp_path):
    """Killed at every change; a folder that is there stays the same one; never a stranger's."""
    out, moments = tmp_path / "out", []
    for event in at_every_change(lambda: claim(out, "test"), tmp_path):
        claim(out, "test")
        assert owner_of(out) == "test", event
        assert {path.name for path in out.iterdir() if not is_transient(path.name)} == {"nano3.json"}
        moments.append(event)
        shutil.rmtree(out)
    assert len(moments) == 4
    shutil.rmtree(out)
    out.mkdir()
    (out / ".lock").touch()
    before = out.stat().st_ino
    (claim(out, "test") / "result").write_text("mine")
    claim(out, "test")
    assert (out.stat().st_ino, hidden(out), (out / "result").read_text()) == (before, [], "mine")
    for kind, name in (("other", "out"), ("test", "stranger")):
        (tmp_path / "stranger").mkdir(exist_ok=True)
        (tmp_path / "stranger/thesis").write_text("mine")
        with pytest.raises(UserError, match=rf"{name} exists and holds files that are not a {kind} of this project"):
            claim(tmp_path / name, kind)
    assert os.listdir(tmp_path / "stranger") == ["thesis"]


def test_the_lock_of_a_folder_is_waited_for_as_long_as_was_said(tmp_path, monkeypatch):
    """By whoever begins again while the children of a killed one end."""
    holder, waits = alone(claim(tmp_path / "out", "test"), "taken"), []
    holder.__enter__()

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            holder.__exit__(None, None, None)

    monkeypatch.setattr(outputs.time, "sleep", sleep)
    with pytest.raises(UserError, match="taken"), alone(tmp_path / "out", "taken"):
        pass
    with alone(tmp_path / "out", "taken", patience=60):
        assert len(waits) == 3


def test_a_folder_that_another_process_marks_meanwhile_is_ours(tmp_path, monkeypatch):
    """Elements of an array begin together."""
    out, listed = tmp_path / "out", Path.iterdir
    out.mkdir()

    def marked_meanwhile(folder):
        monkeypatch.undo()
        names = list(listed(folder))
        mark(folder, "test")
        return names

    for seen_first in (True, False):
        monkeypatch.setattr(Path, "iterdir", marked_meanwhile if seen_first else lambda folder: [folder / "nano3.json"])
        assert is_ours(out, "test")
        monkeypatch.undo()


def test_scratch_of_killed_processes_goes_and_that_of_others_stays(tmp_path):
    out, moments = tmp_path / "out", []

    def work():
        with scratch_folder(out) as scratch:
            (scratch / "half").write_text("half")

    with scratch_folder(out) as mine:
        (mine / "needed").write_text("yes")
        for event in at_every_change(work, tmp_path):
            work()
            assert hidden(out) == [mine.name, f"{mine.name}.lock"], event
            moments.append(event)
        assert (mine / "needed").read_text() == "yes"
    assert len(moments) > 10
    assert hidden(out) == []


def test_files_that_came_later_are_the_users_and_not_what_a_kill_left(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    (out / ".packs-9.lock").touch()
    (out / ".packs-9.partial-1-00000000").mkdir()
    (out / ".packs-9.partial-1-00000000/half").touch()
    (out / ".nano3.json.partial-1-00000000").write_text("{}")
    write(out, "new")
    (out / ".nano3.json.partial-1-00000000").write_text("{}")
    seal(out)
    assert sorted(path.name for path in out.iterdir()) == ["files.json", "nano3.json", "result"]
    for name in (".backup-2024-20240101", ".env.lock"):
        (out / name).write_text("mine")
        with pytest.raises(UserError, match=rf"holds {name}, which its tool did not write"):
            write(out, "newer")
        (out / name).unlink()


def test_a_removal_that_meets_something_new_keeps_the_marker(tmp_path, monkeypatch):
    """As a file that another host holds open on NFS, which comes back under another name."""
    folder = tmp_path / "folder"
    folder.mkdir()
    mark(folder, "test")
    (folder / "open").touch()
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **named: [unlink(path, **named), (folder / ".nfs1").touch()][0])
    with pytest.raises(OSError, match="not empty"):
        remove_folder(folder, "nano3.json")
    monkeypatch.undo()
    assert owner_of(folder) == "test"
