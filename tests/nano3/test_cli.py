"""Scripts' manners: exit codes, and output folders that appear whole or not at all."""

import json
import os
import subprocess
import sys

import pytest

from nano3.cli import UserError, fresh_output, owner_of, run


def write(out, text):
    with fresh_output(out, "test") as folder:
        (folder / "result").write_text(text)


def hidden(out):
    return sorted(path.name for path in out.parent.glob(".*"))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


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


def test_what_a_killed_run_left_is_put_back_or_removed_and_a_live_run_is_left_alone(tmp_path):
    out, pid = tmp_path / "out", dead_pid()
    write(out, "old")
    os.rename(out, tmp_path / f".out.old-{pid}-00000000")  # killed between two renames
    (tmp_path / f".out.partial-{pid}-00000000").mkdir()
    (tmp_path / f".out.partial-{os.getpid()}-00000000").mkdir()
    with pytest.raises(TypeError, match="str"):
        write(out, 1 / 2)
    assert (out / "result").read_text() == "old"
    assert hidden(out) == [f".out.partial-{os.getpid()}-00000000"]


@pytest.mark.parametrize("make", ["file", "stranger", "other kind"])
def test_what_is_not_ours_is_refused_and_kept(tmp_path, make):
    out = tmp_path / "out"
    if make == "file":
        out.write_text("mine")
    elif make == "stranger":
        out.mkdir()
        (out / "thesis").write_text("mine")
    else:
        with fresh_output(out, "another") as folder:
            (folder / "thesis").write_text("mine")
    with pytest.raises(UserError, match="out"):
        write(out, "new")
    assert (out if make == "file" else out / "thesis").read_text() == "mine"


@pytest.mark.parametrize(("error", "code"), [(UserError("the thing; the remedy"), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes(error, code, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "default")

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("pipe", "code"), [("head -1", 0), ("cat", 2)])
def test_only_the_reader_of_our_output_may_have_seen_enough(pipe, code):
    """`| head` is no error; a pipe to a helper process that broke is one, and was once a rank's silent success."""
    main = "def main():\n for n in range(10**5): print(n)\n raise BrokenPipeError(32, 'Broken pipe')\n"
    program = f"from nano3.cli import run\n{main}run(main)"
    shell = f'{sys.executable} -c "$PROGRAM" | {pipe} > /dev/null; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", shell], env={**os.environ, "PROGRAM": program}, capture_output=True, check=False
    )
    assert done.returncode == code, done.stderr
