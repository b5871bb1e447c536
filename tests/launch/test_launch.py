"""Local ranks: they meet, fail together, and none survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import log_file, run_ranks
from nano3.cli import UserError

SUM = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
threads = os.environ["OMP_NUM_THREADS"]
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {total.item()} {threads} {sys.argv[1]}")
dist.destroy_process_group()
"""

LAUNCH = """
import signal, sys
from pathlib import Path
from launch.local import run_ranks
from nano3.cli import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored
run(lambda: run_ranks([sys.argv[1]], 2, Path(sys.argv[2])))
"""

# Each rank says that it lives, has a child that lives too, and waits for ever.
SLEEP = """
import os, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(__file__).with_suffix(f".{os.environ['RANK']}").write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def script(folder: Path, text: str) -> str:
    path = folder / "job.py"
    path.write_text(text)
    return str(path)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent (a zombie) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_ranks_meet_over_loopback_and_rank_0_is_heard(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    logs = tmp_path / "run" / "logs"
    assert run_ranks([script(tmp_path, SUM), "hello"], 2, logs) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    heard = capfd.readouterr().out
    assert f"rank 0 of 2: 3.0 {threads} hello" in heard
    assert "rank 1" not in heard
    assert f"rank 1 of 2: 3.0 {threads} hello" in log_file(logs, 1).read_text()
    assert "rank 0 of 2" in log_file(logs, 0).read_text()


def test_a_failing_rank_ends_the_others_and_shows_its_last_words(tmp_path, capfd):
    job = script(
        tmp_path,
        "import os, sys, time\n"
        "print('rank 0 waits', flush=True)\n"
        "if os.environ['RANK'] == '0': time.sleep(600)\n"
        "sys.exit('disk on fire')\n",
    )
    start = time.monotonic()
    assert run_ranks([job], 2, tmp_path, env={"OMP_NUM_THREADS": "1"}) == 1
    assert time.monotonic() - start < 15
    said = capfd.readouterr().err
    assert "rank 1 failed with exit code 1" in said
    assert "[rank 1] disk on fire" in said
    assert str(log_file(tmp_path, 1)) in said


def test_a_users_mistake_is_said_once(tmp_path, capfd):
    job = script(tmp_path, "import sys; print('error: no such model', file=sys.stderr); sys.exit(2)")
    assert run_ranks([job], 2, tmp_path) == 2
    assert capfd.readouterr().err == "error: no such model\n"


def test_a_rank_killed_by_a_signal_counts_as_failed(tmp_path, capfd):
    job = script(tmp_path, "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(600)")
    assert run_ranks([job], 2, tmp_path) == 128 + 9
    assert "rank 1 failed with exit code 137" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 128 + 15), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
    ids=["SIGTERM", "Ctrl-C", "SIGKILL"],
)
def test_no_rank_outlives_the_launcher(tmp_path, number, code):
    job = script(tmp_path, SLEEP)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, job, str(tmp_path / "logs")])
    notes = [tmp_path / f"job.{rank}" for rank in (0, 1)]
    assert wait_until(lambda: all(note.exists() and len(note.read_text().split()) == 2 for note in notes))
    pids = [[int(pid) for pid in note.read_text().split()] for note in notes]
    assert all(alive(pid) for pair in pids for pid in pair)
    launcher.send_signal(number)
    assert launcher.wait(20) == code
    assert wait_until(lambda: not any(alive(rank) for rank, _ in pids))
    assert wait_until(lambda: not any(alive(child) for _, child in pids))


def guards_of(launcher: int) -> list[int]:
    """The guards that a launcher has started (proc(5): the children of its main thread)."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.full
def test_whoever_is_killed_nothing_is_left(tmp_path):
    """Launcher, guard, a rank: SIGKILL of any ends all, and what the ranks had started in sessions of their own."""
    for victim in ("launcher", "guard", "rank"):
        folder = tmp_path / victim
        folder.mkdir()
        job = script(folder, SLEEP.replace('600)"])', '600)"], start_new_session=True)'))
        launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, job, str(folder / "logs")])
        notes = [folder / f"job.{rank}" for rank in (0, 1)]
        assert wait_until(lambda: all(note.exists() and len(note.read_text().split()) == 2 for note in notes))  # noqa: B023
        pids = [int(pid) for note in notes for pid in note.read_text().split()]
        (guard,) = guards_of(launcher.pid)
        os.kill({"launcher": launcher.pid, "guard": guard, "rank": pids[0]}[victim], signal.SIGKILL)
        assert launcher.wait(30) != 0
        assert wait_until(lambda: not any(map(alive, [guard, *pids])), 30), victim  # noqa: B023


# Ranks that save when they are asked to end, which takes a while.
SAVE = """
import os, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
def save(*_):
    (here / f"asked.{os.environ['RANK']}").touch()
    time.sleep(float(sys.argv[1]))
    (here / f"saved.{os.environ['RANK']}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(here / f"job.{os.environ['RANK']}").touch()
time.sleep(600)
"""


@pytest.mark.full
@pytest.mark.parametrize(("seconds", "times", "saved"), [("6", 1, 2), ("60", 2, 0)], ids=["once", "twice"])
def test_ctrl_c_lets_the_ranks_save_and_a_second_one_does_not(tmp_path, seconds, times, saved):
    launch = LAUNCH.replace("[sys.argv[1]]", f"[sys.argv[1], '{seconds}']")
    launcher = subprocess.Popen([sys.executable, "-c", launch, script(tmp_path, SAVE), str(tmp_path / "logs")])
    assert wait_until(lambda: len(list(tmp_path.glob("job.[01]"))) == 2)
    for _ in range(times):
        launcher.send_signal(signal.SIGINT)
        assert wait_until(lambda: len(list(tmp_path.glob("asked.*"))) == 2)
    assert launcher.wait(20) == 130
    assert len(list(tmp_path.glob("saved.*"))) == saved


def test_no_ranks_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="number of ranks is 0"):
        run_ranks(["x.py"], 0, tmp_path)
