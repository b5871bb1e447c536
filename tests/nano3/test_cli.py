"""Scripts' manners: exit codes, one line for an error, and Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nano3.cli import UserError, run
from nano3.outputs import fresh_file

ROOT = Path(__file__).parents[2]


def test_links_that_lead_to_each_other_end_in_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as ended:
        run(lambda: fresh_file(tmp_path / "loop" / "out").__enter__())
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: Symlink loop")


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


def test_a_fork_that_is_killed_takes_no_lock_of_the_progress_bars_with_it():
    """Found as a preparation in a test that waited for ever for a fork of its process."""
    program = """
import os, signal
from tqdm import tqdm
from nano3.cli import run
tqdm(disable=True)
child = os.fork()
if not child:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
tqdm(disable=True)
print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "goes on\n", done.stderr


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
