"""Scripts' manners: exit codes, and output folders that appear whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nano3.cli import UserError, fresh_file, fresh_output, owner_of, run
from nano3.sealed_folder import check_seal
from tests.helpers.killed import at_every_change

ROOT = Path(__file__).parents[2]


def write(out, text):
    with fresh_output(out, "test") as folder:
        (folder / "result").write_text(text)


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


def test_links_that_lead_to_each_other_end_in_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as ended:
        run(lambda: write(tmp_path / "loop" / "out", "text"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: Symlink loop")


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


def interrupted(script, later):
    """Exit code and words of a script that gets SIGINT `later` modules after it has imported `nano3.cli`."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    words, left = [], None
    for line in process.stderr:
        left = later if line.endswith(" nano3.cli\n") else None if left is None else left - 1
        if left == 0:
            process.send_signal(signal.SIGINT)
        if not line.startswith("import time:"):
            words.append(line)
    return process.wait(), "".join(words)


@pytest.mark.parametrize("script", ["data_prep/prepare.py", "recipes/flat_loop.py"])
@pytest.mark.parametrize("later", [2, 50, 90, 110])
def test_ctrl_c_during_the_imports_of_a_script_is_one_line(script, later):
    """Whichever module is being imported, extensions of NumPy among them: 130, and no traceback."""
    assert interrupted(script, later) == (130, "interrupted\n")


def test_who_imports_the_module_keeps_its_own_ctrl_c():
    """Python's own handler stays where no script of ours begins, and after `run` has begun."""
    code = "import signal, nano3.cli; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True\n"
