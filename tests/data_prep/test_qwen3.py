"""Qwen3's chat format: what the template writes, what the model wrote, and that a tokenizer's own tokens choose it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import qwen3
from data_prep.chat import text_of
from data_prep.chat_formats import NEMOTRON, QWEN3
from data_prep.own_template import TemplateCheck
from data_prep.prepare import prepare
from data_prep.tokens import ChatTokenizer
from nano3.cli import UserError
from nano3.messages import checked_messages
from tests.helpers.data_fixtures import row, write_jsonl, write_tokenizer

ASKED = {"role": "user", "content": "q"}
THOUGHT = {"role": "assistant", "content": "a", "reasoning_content": "r"}
ANSWERED = {"role": "assistant", "content": "b"}


def written(messages: list[dict], **settings: object) -> list[str]:
    """What the loss counts of a conversation."""
    segments = qwen3.render(checked_messages(messages), True, **settings)  # type: ignore[arg-type]
    return [segment.text for segment in segments if segment.supervised]


def test_text_and_mask_by_hand():
    """The empty block before an answer without reasoning is the prompt's; a reasoning is the model's own."""
    messages = checked_messages([{"role": "system", "content": "s"}, ASKED, THOUGHT, ASKED, ANSWERED])
    assert text_of(qwen3.render(messages, True)) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n"
    )
    assert written([ASKED, THOUGHT]) == ["<think>\nr\n</think>\n\na<|im_end|>"]
    assert written([ASKED, THOUGHT, ASKED, ANSWERED]) == ["b<|im_end|>"]
    prompts = [text_of(qwen3.render(checked_messages([ASKED]), thinking, True)) for thinking in (True, False)]
    assert [prompt.partition("assistant\n")[2] for prompt in prompts] == ["", "<think>\n\n</think>\n\n"]


def test_every_answer_is_trained_once_after_a_split():
    parts = qwen3.split_turns([ASKED, THOUGHT, ASKED, ANSWERED])
    assert [written(part, trained_from=start) for part, start in parts] == [
        ["<think>\nr\n</think>\n\na<|im_end|>"],
        ["b<|im_end|>"],
    ]


def test_tools_are_refused():
    with pytest.raises(UserError, match="a conversation with tools: Qwen3's format is known here without them"):
        qwen3.render(checked_messages([ASKED, ANSWERED]), True, tools=[{"name": "f"}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small tokenizer with Qwen3's control tokens at their ids, and our writing of its template."""
    write_tokenizer(tmp_path / "qwen3", dict(QWEN3.control_tokens))
    (tmp_path / "qwen3/chat_template.jinja").write_text(QWEN3.template.read_text())
    return tmp_path / "qwen3"


def test_the_tokenizer_chooses_the_format_and_our_template_is_the_one_that_renders(folder: Path, tmp_path: Path):
    assert ChatTokenizer(folder).format is QWEN3
    assert ChatTokenizer("pico").format is NEMOTRON
    check = TemplateCheck(folder, QWEN3)
    for messages in ([ASKED, ANSWERED], [ASKED, THOUGHT]):
        check.check(checked_messages(messages), [])
    with pytest.raises(UserError, match="use the tokenizer folder of Nemotron-3-Nano"):
        TemplateCheck(folder, NEMOTRON).check(checked_messages([ASKED, ANSWERED]), [])
    write_jsonl(tmp_path / "rows.jsonl", [row("ab", "cd", "ef")])
    store, _ = prepare([tmp_path / "rows.jsonl"], folder, tmp_path / "store", 64)
    tokens, mask = store.document(0)
    trained = tokens[mask > 0]
    assert (trained[0], trained[-1]) == (QWEN3.control_tokens["<think>"], QWEN3.control_tokens["<|im_end|>"])
