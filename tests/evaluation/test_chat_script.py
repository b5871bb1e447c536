"""Talking to models: each has its own history, and both get every line."""

from __future__ import annotations

import io

from evaluation.chat import Talk, talk
from evaluation.generation import GREEDY
from evaluation.models import Written


class Echo:
    """Says how many messages it was given, and the last."""

    def answers(self, questions, limit, sampling):
        del limit, sampling
        [question] = questions
        return [[Written(f"thought</think>{len(question.messages)} {question.text}", question.text != "cut", 1)]]


def test_two_models_get_every_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n/new\ncut\n/quit\nnever\n"))
    talk([Talk("a", Echo(), ""), Talk("b", Echo(), "be brief")], 8, GREEDY)
    said = capsys.readouterr().out.replace("thought</think>\n", "")
    lines = ["a> 1 hello", "b> 2 hello", "a> 3 again", "b> 4 again", "(a new conversation)"]
    assert said.splitlines()[:5] == lines
    assert "a> 1 cut … (cut at 8 tokens" in said
    assert "never" not in said
