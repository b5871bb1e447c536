"""A model behind a server that drops, stalls, truncates and repeats: the same result file, each question asked once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evaluation.evaluate import main
from evaluation.generation import GREEDY
from evaluation.judging.questions import Question, load_questions
from evaluation.server import ServerModel
from nano3.cli import UserError

FAULTS = ("honest", "drops", "stalls", "truncates", "twice", "half", "two choices", "cut early", "errors", "drips")
QUESTIONS = 40


class Fake:
    """Answers "N" to "What is N?"; every 7th request it misbehaves in one way. Counts answers that went out whole."""

    def __init__(self, fault: str, wait_after: int | None = None) -> None:
        self.fault, self.wait_after = fault, wait_after
        self.bodies: list[bytes] = []
        self.asked, self.answered = Counter[str](), Counter[str]()
        self.requests, self.lock = 0, threading.Lock()

    def reply(self, text: str, reason: str = "stop") -> bytes:
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        choices = [choice] * (2 if self.fault == "two choices" and reason == "fault" else 1)
        return json.dumps({"choices": choices, "usage": {"completion_tokens": 1}}).encode()


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(json.dumps({"object": "list", "data": [{"id": "pico"}]}).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            question = json.loads(body)["messages"][-1]["content"]
            with fake.lock:
                fake.bodies.append(body)
                fake.requests += 1
                number = fake.requests
                fake.asked[question] += 1
            while fake.wait_after is not None and number > fake.wait_after:
                time.sleep(0.05)
            text = question.split()[-1].rstrip("?")
            if number % 7 == 0 and fake.fault != "honest":
                self.misbehave(text)
                return
            with fake.lock:
                fake.answered[question] += 1
            self.send(fake.reply(text))

        def misbehave(self, text: str) -> None:
            whole = fake.reply(text)
            if fake.fault == "drops":
                self.close_connection = True
            elif fake.fault == "stalls":
                time.sleep(4.0)
            elif fake.fault == "truncates":  # fewer bytes than announced
                self.send(whole[:-9], len(whole))
                self.close_connection = True
            elif fake.fault == "twice":  # the document twice in one body
                self.send(whole + whole)
            elif fake.fault == "half":  # cut, and announced as such
                self.send(whole[: len(whole) // 2])
            elif fake.fault == "two choices":
                self.send(fake.reply(text, "fault"))
            elif fake.fault == "cut early":  # "length" after one token of many
                self.send(fake.reply(text[:1], "length"))
            elif fake.fault == "errors":
                self.send(b'{"error": "overloaded"}', status=503)
            else:  # a byte at a time, beyond the deadline
                self.send(b"", len(whole))
                for byte in range(len(whole)):
                    time.sleep(0.05)
                    self.wfile.write(whole[byte : byte + 1])

        def send(self, body: bytes, length: int | None = None, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "held.jsonl"
    rows = [
        {
            "id": str(n),
            "messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": str(n)}],
        }
        for n in range(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(url: str, held: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    command = [
        "evaluate.py",
        url,
        "--questions",
        str(held),
        "--out",
        str(out),
        "--timeout",
        "2",  # long enough for an honest answer on a machine with much else to do
        "--concurrency",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    result = json.loads(out.read_text())
    return result | {"model": result["model"].replace(url, "URL")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_misbehaves_gives_the_result_of_an_honest_one(fault, held, tmp_path, monkeypatch):
    fake = Fake(fault)
    with serving(fake) as url:
        result = evaluated(url, held, tmp_path / "result.json", monkeypatch)
    assert (result["n"], result["correct"], result["unfinished"]) == (QUESTIONS, QUESTIONS, 0)
    assert [row["answer"] for row in result["answers"]] == [str(n) for n in range(QUESTIONS)]
    with serving(Fake("honest")) as url:
        honest = evaluated(url, held, tmp_path / "honest.json", monkeypatch)
    assert result == honest
    assert set(fake.answered.values()) == {1}  # what came whole was not asked for again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["honest.json", "result.json"]


def test_a_run_that_was_killed_asks_no_answered_question_again(held, tmp_path):
    """The server answers 15 requests and then nobody; the run is killed; a second run asks for the rest."""
    fake = Fake("honest", wait_after=15)
    with serving(fake) as url:
        script = Path(__file__).parents[2] / "evaluation" / "evaluate.py"
        command = [sys.executable, str(script), url, "--questions", str(held), "--out", str(tmp_path / "result.json")]
        first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        kept = tmp_path / "result.json.answers.jsonl"
        until = time.monotonic() + 30
        while time.monotonic() < until and not (kept.exists() and kept.read_text().count("\n") == 15):
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
        with kept.open("a") as file:
            file.write('{"key": "half a li')  # what the kill left
        done, fake.wait_after = fake.answered.copy(), None
        assert sum(done.values()) == 15
        time.sleep(0.2)  # requests that the killed run had sent are answered to nobody
        fake.asked.clear()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert not set(done) & set(fake.asked)
    assert len(fake.asked) == QUESTIONS - 15
    assert json.loads((tmp_path / "result.json").read_text())["correct"] == QUESTIONS
    assert not kept.exists()


def test_equal_requests_are_sent_once_and_a_refusal_is_final(held, tmp_path, monkeypatch):
    questions = load_questions(held, 3)
    twin = Question("twin", "s", questions[0].messages, "0")
    fake = Fake("honest")
    with serving(fake) as url:
        model = ServerModel(url, None, tmp_path / "kept", 5.0, 2, False)
        answers = model.answers([*questions, twin], 40, GREEDY)
        assert [several[0].text for several in answers] == ["0", "1", "2", "0"]
        assert sum(fake.asked.values()) == 3
        with pytest.raises(UserError, match="serves pico; choose with --served-model"):
            ServerModel(url, "other", tmp_path / "kept", 5.0, 2, False)
        monkeypatch.setattr(fake, "reply", lambda *_: b"[1]")
        monkeypatch.setattr("evaluation.server.ATTEMPTS", 2)
        with pytest.raises(UserError, match="no whole answer in 2 attempts"):
            model.answers([Question("new", "s", ({"role": "user", "content": "What is 9?"},), "9")], 40, GREEDY)
    with pytest.raises(UserError, match="no whole answer in 2 attempts"):
        ServerModel(url, None, tmp_path / "kept", 1.0, 2, False)


LIKELY = {"B": -0.1, "the": -2.5, "C": -3.0, " B": -3.5}
"""What the server finds likeliest; A is not among it."""


def letter_question(key: str) -> Question:
    asked = ({"role": "user", "content": f"Which is {key}?"},)
    return Question(key, "s", asked, "B", choices=("red", "green", "blue"))


def test_letters_are_the_likeliest_first_tokens(tmp_path, monkeypatch):
    """B and C as listed, A as unlikely as the last that is listed; asked once, kept, and refused by name."""
    fake = Fake("honest")
    listed = [{"token": token, "logprob": value} for token, value in LIKELY.items()]
    given = {"logprobs": {"content": [{"top_logprobs": listed}]}}

    def reply(*_: object) -> bytes:
        choice = {"message": {"role": "assistant", "content": "B"}, "finish_reason": "length", **given}
        return json.dumps({"choices": [choice]}).encode()

    monkeypatch.setattr(fake, "reply", reply)
    with serving(fake) as url:
        model = ServerModel(url, None, tmp_path / "kept", 5.0, 2, thinking=True)
        assert model.letters([letter_question("x"), letter_question("y")]) == [[-3.5, -0.1, -3.0]] * 2
        body = json.loads(fake.bodies[0])
        assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        again = ServerModel(url, None, tmp_path / "kept", 5.0, 2, thinking=False)
        assert again.letters([letter_question("x")]) == [[-3.5, -0.1, -3.0]]
        assert sum(fake.asked.values()) == 2
        del listed[0]
        del listed[1]
        with pytest.raises(UserError, match="none of the letters of question z is among the 2 likeliest tokens"):
            again.letters([letter_question("z")])
        given.clear()
        with pytest.raises(UserError, match=r"gives no log-probabilities .*; say --method generate"):
            again.letters([letter_question("w")])
    (tmp_path / "kept").write_text('{"key": "k", "text": "t"}\n')
    with pytest.raises(UserError, match="finished is missing"), serving(fake) as url:
        ServerModel(url, None, tmp_path / "kept", 5.0, 2, thinking=False)


def test_tools_and_calls_are_sent_in_openais_form_and_plain_messages_as_they_are(tmp_path):
    tool = {"name": "look", "parameters": {"type": "object", "properties": {"where": {"type": "string"}}}}
    calls = [{"name": "look", "arguments": {"where": "Zürich"}}, {"name": "look", "arguments": {}}]
    asked = (
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "here"},
        {"role": "tool", "content": "there"},
        {"role": "user", "content": "What is 7?"},
    )
    plain = ({"role": "user", "content": "What is 8?"},)
    fake = Fake("honest")
    with serving(fake) as url:
        model = ServerModel(url, None, tmp_path / "kept", 5.0, 1, False)
        model.answers([Question("a", "s", asked, "7", tools=(tool,)), Question("b", "s", plain, "8")], 40, GREEDY)
    with_tools, without = fake.bodies
    sent = json.loads(with_tools)
    assert sent["tools"] == [{"type": "function", "function": tool}]
    assert sent["messages"][1]["tool_calls"] == [
        {"id": "call-1-0", "type": "function", "function": {"name": "look", "arguments": '{"where": "Zürich"}'}},
        {"id": "call-1-1", "type": "function", "function": {"name": "look", "arguments": "{}"}},
    ]
    assert [message.get("tool_call_id") for message in sent["messages"]] == [None, None, "call-1-0", "call-1-1", None]
    assert without == (
        b'{"model": "pico", "messages": [{"role": "user", "content": "What is 8?"}], "max_tokens": 40, "temperature": '
        b'0.0, "top_p": 1.0, "seed": 0, "chat_template_kwargs": {"enable_thinking": false}}'
    )
