"""What a job's script does about what befalls it. Slurm is a stand-in here, and the real one in test_real_slurm.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "set -euo pipefail\nOUT={out}\nJOB={name}\nsource launch/slurm/survive.sh\nsurvive {command}\nfinished\n"
STAND_INS = {
    "squeue": 'for option in "$@"; do [[ $option != --jobs=* ]] || file="$HERE/state-${option#--jobs=}"; done\n'
    'if [[ -e $file ]]; then cat "$file"; else echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi',
    "scontrol": 'if [[ $1 == show ]]; then echo "$@" > "$HERE/shown"; echo "   StdOut=$HERE/log"\n'
    'else echo "$@" >> "$HERE/requeued"; fi',
    "sinfo": 'cat "$HERE/down" 2> /dev/null || true',
    "scancel": 'echo "$@" > "$HERE/told"; kill -TERM "$(cat "$HERE/pid")"',
}
FAILED = """\
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_20:20:52
  host      : node8
  rank      : 11 (local_rank: 3)
  exitcode  : -9 (pid: 13059)
srun: error: node7: task 0: Exited with exit code 1
"""


class Job:
    """A job 7 on nodes 7 and 8 that runs one command; `here` has what Slurm's stand-ins know and were told."""

    def __init__(self, here: Path) -> None:
        self.here, self.out, self.name = here, here / "out", "7"
        self.out.mkdir()
        for name, body in STAND_INS.items():
            (here / name).write_text(f"#!/bin/bash\n{body}\n")
            (here / name).chmod(0o755)
        (here / "state-7").write_text("RUNNING\n")

    def start(self, command: str, restart: int = 0) -> subprocess.Popen[bytes]:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": str(restart)}
        environment = os.environ | slurm | {"HERE": str(self.here), "PATH": f"{self.here}:{os.environ['PATH']}"}
        with (self.here / "log").open("ab") as log:
            script = SCRIPT.format(out=self.out, name=self.name, command=command)
            return subprocess.Popen(["bash", "-c", script], cwd=ROOT, env=environment, stdout=log, stderr=log)

    def run(self, command: str, restart: int = 0) -> int:
        return self.start(command, restart).wait(timeout=60)

    @property
    def log(self) -> str:
        return (self.here / "log").read_text()

    @property
    def requeued(self) -> bool:
        return (self.here / "requeued").exists()

    def attempts(self) -> list[list[str]]:
        """Event, step and words of every line."""
        lines = [line.split("\t") for line in (self.out / "attempts.tsv").read_text().splitlines()]
        assert all(line[2] == "7" and line[4] == "node[7-8]" for line in lines)
        return [[line[0], line[1], line[5]] for line in lines]


def wait_for(path: Path, lines: int = 1) -> None:
    """Until the file has that many lines."""
    deadline = time.monotonic() + 30
    while not path.exists() or path.read_text().count("\n") < lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_job_that_ends_well_leaves_the_folder_to_others(job):
    (job.out / "checkpoints" / "step-000040").mkdir(parents=True)
    (job.out / "checkpoints" / "step-1000000").mkdir()
    (job.out / "checkpoints" / ".step-1000001.partial-1-ab").mkdir()
    assert job.run('bash -c "cat $OUT/job"') == 0
    assert job.log == "7\n"  # while it runs the folder is its own
    assert job.attempts() == [["begun", "1000000", ""], ["finished", "1000000", ""]]
    assert [path.name for path in job.out.glob("*job*")] == []
    assert not job.requeued


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("srun: error: node8: task 1: Killed\nsrun: error: node7: task 0: Terminated\n", "node8: task 1: Killed"),
        (
            "srun: error: node7: task 0: Exited with exit code 1\nsrun: error: node8: task 1: Killed\n",
            "node8: task 1: Killed",
        ),
        ("srun: error: node7: task 0: Exited with exit code 1\n", "node7: task 0: Exited with exit code 1"),
        (FAILED, "rank 11 on node8 ended by signal 9"),
        (
            "error: no answer for 60 s from rank 2 (process 9 on node7, in step 12): stopped, or its machine stands "
            "still. All ranks end; the same command resumes the run\n" + FAILED,
            "no answer for 60 s from rank 2 (process 9 on node7, in step 12)",
        ),
        ("", ""),
    ],
)
def test_ranks_that_die_are_named_and_the_job_is_requeued(job, said, words):
    (job.here / "log").write_text("srun: error: node9: of the attempt before\n")
    (job.here / "said").write_text(said)
    assert job.run(f'bash -c "cat {job.here}/said; exit 5"') == 5
    assert job.attempts()[-1] == ["ended", "0", f"exit code 5; {words}"]
    assert (job.here / "requeued").read_text() == "requeue 7\n"
    assert (job.out / "job").read_text() == "7\n"  # it waits for its next start


def test_a_mistake_is_not_tried_again(job):
    assert job.run("bash -c 'exit 2'") == 2
    assert not job.requeued
    assert not (job.out / "job").exists()


def test_where_slurm_does_not_answer_what_dies_is_requeued(job):
    """A busy controller is no sign that Slurm has taken the job, and a log that it cannot name does not end it."""
    for name in ("squeue", "scontrol"):
        busy = "[[ $1 == requeue ]] || { echo 'error: Unable to contact slurm controller' >&2; exit 1; }"
        (job.here / name).write_text(f"#!/bin/bash\n{busy}\n{STAND_INS[name]}\n")
    assert job.run("bash -c 'exit 5'") == 5
    assert job.attempts() == [["begun", "0", ""], ["ended", "0", "exit code 5; "]]
    assert job.requeued


def test_a_job_that_slurm_does_not_know_any_more_is_gone(job):
    (job.here / "state-7").unlink()
    assert job.run("bash -c 'exit 5'") == 5
    assert job.attempts()[-1] == ["taken", "0", "Slurm ended it"]
    assert not job.requeued


@pytest.mark.parametrize(
    ("down", "event", "words"),
    [
        ("", "taken", "Slurm ended it"),
        ("node node8 is down (no power)\n", "ended", "Slurm ended it; node node8 is down (no power)"),
    ],
)
def test_what_slurm_takes_is_slurms_to_requeue(job, down, event, words):
    (job.here / "state-7").write_text("COMPLETING\n")
    (job.here / "down").write_text(down)
    assert job.run("bash -c 'exit 9'") == 9
    assert job.attempts()[-1] == [event, "0", words]
    assert not job.requeued


def test_what_slurm_takes_is_noted_at_once(job):
    """The ranks may save for longer than Slurm lets the script live."""
    process = job.start(f"bash -c 'echo $$ > {job.here}/pid; exec sleep 60'")
    wait_for(job.here / "pid")
    (job.here / "state-7").write_text("COMPLETING\n")
    (job.here / "down").write_text("node node8 is down* (no power)\n")
    process.send_signal(signal.SIGTERM)
    wait_for(job.out / "attempts.tsv", lines=2)
    assert process.poll() is None
    assert job.attempts()[-1] == ["ended", "0", "Slurm ended it; node node8 is down* (no power)"]
    os.kill(int((job.here / "pid").read_text()), signal.SIGTERM)
    process.wait(timeout=30)
    assert len(job.attempts()) == 2
    assert not (job.here / "told").exists()  # Slurm has told the ranks itself


def is_told_to_end(job: Job) -> None:
    """Starts the job and ends it as Slurm does before the time limit."""
    process = job.start(f"bash -c 'echo $$ > {job.here}/pid; exec sleep 60'")
    wait_for(job.here / "pid")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("state", ["RUNNING", "SIGNALING"])
def test_sigterm_reaches_the_ranks_and_the_job_is_requeued(job, state):
    """Slurm calls a job SIGNALING while its signal is on the way to all nodes."""
    (job.here / "state-7").write_text(f"{state}\n")
    is_told_to_end(job)
    assert (job.here / "told").read_text() == "--signal=TERM 7\n"
    assert job.attempts()[-1] == ["ended", "0", "exit code 143; the time limit came"]
    assert job.requeued


def attempts(*lines: tuple[str, int, int]) -> str:
    """attempts.tsv of (event, step, job)."""
    return "".join(f"{event}\t{step}\t{job}\t{row // 2}\tnode7\twhy\n" for row, (event, step, job) in enumerate(lines))


BEGUN, ENDED, TAKEN = ("begun", 0, 7), ("ended", 0, 7), ("taken", 0, 7)


@pytest.mark.parametrize(
    ("before", "stops"),
    [
        ([BEGUN, ENDED] * 3, True),
        ([BEGUN, ENDED] * 2, False),
        ([BEGUN] * 3, True),  # without a word, as when the first node is gone
        ([BEGUN, ENDED, BEGUN, BEGUN, ENDED], True),
        ([BEGUN, ENDED, BEGUN, TAKEN, BEGUN, ENDED], False),  # Slurm's own doing is no death
        ([BEGUN, TAKEN] * 9, False),
        ([("begun", 0, 6), ("ended", 0, 6)] * 3, False),  # an earlier job: somebody may have mended it
        ([BEGUN, ENDED] * 2 + [("begun", 5, 7), ("ended", 5, 7)] + [BEGUN, ENDED], False),
    ],
)
def test_three_deaths_at_one_step_are_enough(job, before, stops):
    (job.out / "attempts.tsv").write_text(attempts(*before))
    assert job.run("true", restart=3) == (2 if stops else 0)
    assert ("after step 0 this run died 3 times and got no further:\n  restart " in job.log) == stops
    assert not (job.out / "job").exists()
    assert not job.requeued


@pytest.mark.parametrize(("state", "code"), [("RUNNING", 2), ("PENDING", 2), ("", 0), (None, 0)])
def test_two_jobs_never_write_to_one_folder(job, state, code):
    (job.out / "job").write_text("6\n")
    if state is not None:
        (job.here / "state-6").write_text(state)
    assert job.run("true") == code
    assert (f"error: job 6 writes to {job.out}; wait for it, or end it with: scancel 6" in job.log) == bool(code)
    assert [path.read_text() for path in job.out.glob("*job*")] == (["6\n"] if code else [])


@pytest.fixture
def of_array(job: Job) -> Job:
    """The job of an array that has the array's own number: by that, Slurm would mean all of them."""
    job.name = "7_3"
    (job.here / "state-7").write_text("RUNNING\nPENDING\n")
    (job.here / "state-7_3").write_text("RUNNING\n")
    (job.here / "state-7_4").write_text("RUNNING\n")
    return job


def test_a_job_of_an_array_asks_and_tells_slurm_of_itself_only(of_array):
    is_told_to_end(of_array)
    assert (of_array.here / "told").read_text() == "--signal=TERM 7_3\n"
    assert (of_array.here / "requeued").read_text() == "requeue 7_3\n"
    assert (of_array.here / "shown").read_text() == "show job 7_3\n"
    assert (of_array.out / "job").read_text() == "7_3\n"
    assert [line.split("\t")[2] for line in (of_array.out / "attempts.tsv").read_text().splitlines()] == ["7_3", "7_3"]


@pytest.mark.parametrize(("owner", "code"), [("7_3", 0), ("7_4", 2)])
def test_a_job_of_an_array_takes_the_folder_that_was_submitted_for_it(of_array, owner, code):
    (of_array.out / "job").write_text(f"{owner}\n")
    assert of_array.run("true") == code


def test_where_slurm_does_not_answer_the_other_job_may_live(job):
    (job.out / "job").write_text("6\n")
    (job.here / "squeue").write_text("#!/bin/bash\necho 'error: Unable to contact slurm controller' >&2\nexit 1\n")
    assert job.run("true") == 2


@pytest.mark.parametrize("deaths", [0, 3])
def test_a_run_that_was_finished_when_its_job_was_requeued_is_not_started(job, deaths):
    (job.out / "attempts.tsv").write_text(attempts(*[BEGUN, ENDED] * deaths))
    (job.out / "adapter").mkdir()
    (job.out / "adapter" / "lora.json").write_text("{}")
    (job.out / "job").write_text("7\n")
    assert job.run(f"touch {job.here}/ran", restart=1) == 0
    assert not (job.here / "ran").exists()
    assert not (job.out / "job").exists()
