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
    children = [child for _, child in pids]
    if number == signal.SIGKILL:  # nobody is left to end a rank's own children: the kernel ends only the ranks
        for child in children:
            os.kill(child, signal.SIGKILL)
    assert wait_until(lambda: not any(alive(child) for child in children))


def test_no_ranks_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="number of ranks is 0"):
        run_ranks(["x.py"], 0, tmp_path)
