"""Large data as a Slurm array: who has shards missing, what is handed in again, how an element that fails ends."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launch.chain import shards, submission
from launch.chain.records import Records
from launch.chain.shards import Shards
from launch.chain.stages import Chain, Stage
from launch.slurm import job_queue
from launch.slurm.cluster import Cluster
from launch.slurm.sbatch import Job, render
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.token_store import part_name, unfinished_folder
from tests.launch.test_slurm import fake_slurm

SITE = Cluster("me", "gpu", cpu_partition="cpu", cpu_cores=8, logs="logs")


def finish(store: Path, *numbers: int, last: int = -1) -> None:
    """Leaves markers of finished parts, as prepare.py does."""
    for number in numbers:
        part = unfinished_folder(store) / part_name(number)
        part.mkdir(parents=True, exist_ok=True)
        (part / "part.json").write_text(json.dumps({"last": number == last}))


def test_elements_with_a_shard_missing_are_known_by_the_markers(tmp_path: Path) -> None:
    array = Shards(("data_prep/prepare.py",), tmp_path / "data", 4)
    assert array.missing() == (1, 2, 3, 4)
    finish(array.store, 0, 1, 3, 5)
    assert array.missing() == (1, 2, 3, 4)  # who knows how many shards there are?
    finish(array.store, 6, last=6)
    assert array.missing() == (1, 3)  # shards 2 and 4 of seven
    finish(array.store, 4)
    assert array.missing() == (3,)
    finish(array.store, 2)
    assert array.missing() == ()
    assert array.job(SITE, tmp_path) is None


def test_the_array_of_what_is_missing(tmp_path: Path) -> None:
    array = Shards(("data_prep/prepare.py", "--out", "o"), tmp_path / "data", 4, at_once=2)
    finish(array.store, 0, 4, last=4)
    found = array.job(SITE, tmp_path / "run")
    assert found is not None
    text = render(*found)
    for line in (
        "#SBATCH --job-name=run-shards",
        "#SBATCH --partition=cpu",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --array=2-4%2",
        "#SBATCH --output=logs/run-shards-%A_%a.log",
        "CODE=0\nsrun --kill-on-bad-exit=1 --cpu-bind=none --cpus-per-task=8 --nodes=1 --ntasks=1 python "
        'launch/slurm/inside.py data_prep/prepare.py --out o --shard "$SLURM_ARRAY_TASK_ID"/4 || CODE=$?\n',
    ):
        assert line in text
    assert shards.describe(array.store, 7, {7: "RUNNING n1"}) == "job 7 RUNNING n1; 2 of 5 shards are there"
    assert shards.describe(tmp_path / "other", 7, {}) == "job 7 ended; its parts are joined or gone"


def test_an_array_is_no_longer_than_slurm_lets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "SchedulerType = x\nMaxArraySize            = 5\n"
    monkeypatch.setattr(job_queue, "_slurm", lambda command: said if command[0] == "scontrol" else "")
    assert Shards((), tmp_path, 9).fitted().elements == 4
    assert Shards((), tmp_path, 3).fitted().elements == 3
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm: its default
    assert Shards((), tmp_path, 5000).fitted().elements == 1000
    for wrong in ({"elements": 0}, {"elements": 4, "at_once": -1}):
        with pytest.raises(UserError, match=r"--shards \d must be at least 1, and --shards-at-once -?\d 0 or more"):
            Shards((), tmp_path, **wrong)


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(0, 0, False), (1, 0, True), (137, 1, True),
                                                            (1, 2, False), (2, 0, False)])  # fmt: skip
def test_an_element_that_fails_is_tried_again_and_a_mistake_is_not(
    tmp_path: Path, code: int, restarts: int, requeued: bool
) -> None:
    job = Job("a", ["x", "{seed}"], seeds=(3, 5), retries=2, ranks=False)
    environment = fake_slurm(tmp_path) | {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "5"}
    (tmp_path / "python").write_text(f"#!/bin/bash\nexit {code}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/asked\n')
    script = render(Cluster("me", "p", hardware="cpu", workdir=str(tmp_path)), job)
    done = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, check=False,
        env=environment | {"SLURM_RESTART_COUNT": str(restarts)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert (tmp_path / "asked").exists() is requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 70_5\n"


def test_retries_are_for_jobs_of_one_process() -> None:
    for wrong in ({"seeds": (1,), "command": ["{seed}"]}, {"command": ["x"], "ranks": False}):
        with pytest.raises(UserError, match=r"retries are of an array's jobs of one process"):
            Job("a", retries=1, **wrong)


def test_the_join_waits_for_the_array_and_an_array_is_handed_in_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    array, records = Shards(("prepare",), tmp_path / "data", 4), Records(tmp_path)
    stage = Stage("prepare", (("join",),), tmp_path / "data", shards=array)
    sent: list[Job] = []
    monkeypatch.setattr(submission, "hand_in", lambda _site, job: sent.append(job) or 10 + len(sent))

    def submitted(alive: dict[int, str]) -> list[tuple[tuple[int, ...], int | None]]:
        sent.clear()
        submission.submit_all((stage,), records, SITE, tmp_path, alive)
        return [(job.seeds, job.after) for job in sent]

    assert submitted({}) == [((1, 2, 3, 4), None), ((), 11)]
    assert submitted({11: "RUNNING", 12: "PENDING"}) == []
    assert submitted({11: "RUNNING"}) == [((), 11)]  # the join was cancelled
    finish(array.store, 0, 2, 3, last=3)  # and shard 1 failed: its element again, the rest untouched
    assert submitted({}) == [((2,), None), ((), 11)]
    finish(array.store, 1)
    assert submitted({}) == [((), None)]
    assert "shards    all are there" in capsys.readouterr().out
    with pytest.raises(UserError, match="stage shards is job 11, which is queued or runs; cancel it first"):
        records.forget("prepare", {11: "RUNNING"})


def test_a_chain_of_shards_joins_what_one_process_would_prepare(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    arguments = (resolve_model("pico"), (tmp_path / "a",), tmp_path / "a", tmp_path)
    (one, *_), (many, *_) = Chain(*arguments).stages(), Chain(*arguments, shards=4, at_once=2).stages()
    assert one.shards is None
    assert many.commands == (*one.commands[:-1], (*one.commands[-1], "--join"))
    assert many.shards == Shards(one.commands[-1], tmp_path / "data", 4, 2)
