"""A teacher that lies, repeats itself, drops, stalls and truncates: only right answers become rows, each asked once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from evaluation import distill
from evaluation.server import ServerModel
from nano3.arch import resolve_model
from nano3.cli import UserError
from nano3.rows import about_file
from tests.evaluation.test_server import QUESTIONS, Fake, serving

SAMPLES = 3


class Teacher(Fake):
    """Lies about every fourth number, thinks aloud about the next, writes a control token for the one after that."""

    def reply(self, text: str, reason: str = "stop") -> bytes:
        kind = int(text) % 4 if text.isdigit() else 3
        said = {0: text + "7", 1: f"<think>\nI count.\n</think>\n\n{text}", 2: f"<s>{text}", 3: text}[kind]
        message = {"role": "assistant", "content": said}
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        return json.dumps({"choices": [{"message": message, "finish_reason": reason}], "usage": usage}).encode()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions "What is N?" with their answers."""
    path = tmp_path_factory.mktemp("questions") / "train.jsonl"
    talk = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": str(n)}]
        for n in range(QUESTIONS)
    ]
    rows = [{"id": str(n), "messages": messages} for n, messages in enumerate(talk)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def distilled(url: str, asked: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict]:
    """The rows that come of it."""
    command = ["distill.py", url, "--task", "gsm8k", "--questions", str(asked), "--out", str(out), "--timeout", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--samples", str(SAMPLES), "--concurrency", "4", *more])
    assert distill.main() == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("fault", ["honest", "drops", "stalls", "truncates"])
def test_only_right_answers_become_rows(fault, asked, tmp_path, monkeypatch, capsys):
    out = tmp_path / "traces.jsonl"
    teacher = Teacher(fault)
    with serving(teacher) as url:
        prices = ("--price-in", "2", "--price-out", "5")
        rows = distilled(url, asked, out, monkeypatch, *prices)
        assert set(teacher.answered.values()) == {SAMPLES}  # what came whole was not asked for again
        before = sum(teacher.asked.values())
        assert distilled(url, asked, out, monkeypatch, *prices) == rows  # the answers are kept: nothing is paid twice
        assert sum(teacher.asked.values()) == before
    # Of each question one row: its three answers are the same. Lies and control tokens are none.
    assert [row["id"] for row in rows] == [f"{n}-0" for n in range(QUESTIONS) if n % 4 in (1, 3)]
    for row in rows:
        reply, number = row["messages"][-1], row["id"].removesuffix("-0")
        assert (reply["content"], row["answer"]) == (number, number)
        assert reply.get("reasoning_content") == ("I count." if int(number) % 4 == 1 else None)
    about = json.loads(about_file(out).read_text())
    assert (about["questions"], about["questions_with_rows"], about["rows"]) == (40, 20, 20)
    assert sum(about["outcomes"].values()) == 40 * SAMPLES
    assert (about["tokens_asked"], about["tokens_written"]) == (1200, 240)
    assert about["cost"] == pytest.approx((1200 * 2 + 240 * 5) / 1e6)
    assert "20 traces of 20 of 40 questions" in capsys.readouterr().out
    if fault == "honest":
        store, _ = prepare([out], resolve_model("pico"), tmp_path / "store", 128)
        assert len(store) == 20


def test_held_out_questions_are_not_asked(asked, tmp_path, monkeypatch):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(line + "\n" for line in asked.read_text().splitlines()[:30]))
    teacher = Teacher("honest")
    with serving(teacher) as url:
        rows = distilled(url, asked, tmp_path / "traces.jsonl", monkeypatch, "--exclude", str(held), "--keep", "1")
    assert set(teacher.asked) == {f"What is {n}?" for n in range(30, QUESTIONS)}
    assert {row["id"] for row in rows} == {"31-0", "33-0", "35-0", "37-0", "39-0"}


def test_a_killed_run_asks_no_answered_question_again(asked, tmp_path):
    teacher = Teacher("honest", wait_after=15)
    with serving(teacher) as url:
        script = Path(__file__).parents[2] / "evaluation" / "distill.py"
        command = [sys.executable, str(script), url, "--task", "gsm8k", "--questions", str(asked), "--samples", "1"]
        command += ["--temperature", "0", "--out", str(tmp_path / "traces.jsonl")]
        first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        kept = tmp_path / "traces.jsonl.answers.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (kept.exists() and kept.read_text().count("\n") == 15):
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert not (tmp_path / "traces.jsonl").exists()
        done, teacher.wait_after = teacher.answered.copy(), None
        assert sum(done.values()) == 15
        time.sleep(0.2)  # requests that the killed run had sent are answered to nobody
        teacher.asked.clear()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert not set(done) & set(teacher.asked)
    assert len(teacher.asked) == QUESTIONS - 15
    assert len((tmp_path / "traces.jsonl").read_text().splitlines()) == 20


def test_requests_are_spaced(tmp_path, monkeypatch):
    """At 120 a minute each of four requests at once begins half a second after the one before it."""
    waits: list[float] = []
    with serving(Teacher("honest")) as url:
        model = ServerModel(url, None, tmp_path / "kept", 2.0, 1, False, per_minute=120)
    monkeypatch.setattr("evaluation.server.time.monotonic", lambda: 1000.0)
    monkeypatch.setattr(model._stopping, "wait", waits.append)
    model._free_at = 0.0
    for _ in range(4):
        model._wait_for_turn()
    assert waits == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("row", "arguments", "words"),
    [
        ({"evaluation_only": True}, (), "question 0 of train is for evaluation only; give others"),
        ({"tools": [{"name": "f"}]}, (), "question 0 has tools"),
        ({}, ("--price-in", "1"), "give both --price-in and --price-out"),
        ({}, ("--per-minute", "0"), "--per-minute 0.0 must be above 0"),
        ({}, ("--temperature", "0"), "--samples 3 needs --temperature above 0"),
        ({}, ("--questions", "{out}"), "no such file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(row, arguments, words, asked, tmp_path, monkeypatch):
    first = json.loads(asked.read_text().splitlines()[0]) | row
    (tmp_path / "train.jsonl").write_text(json.dumps(first) + "\n")
    out, teacher = tmp_path / "traces.jsonl", Teacher("honest")
    more = [argument.format(out=out) for argument in arguments]
    with serving(teacher) as url, pytest.raises(UserError, match=words):
        distilled(url, tmp_path / "train.jsonl", out, monkeypatch, *more)
    assert not teacher.asked
    assert not out.exists()
