"""A tokenizer folder's own chat template beside ours: what stops a preparation, what does not, and what is bounded."""

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest

from data_prep import own_template
from data_prep.chat import TEMPLATE_FILE
from data_prep.own_template import TemplateCheck
from data_prep.prepare import prepare
from nano3.cli import UserError
from nano3.messages import checked_messages, checked_tools
from tests.helpers.data_fixtures import row, write_jsonl, write_tokenizer

OURS = TEMPLATE_FILE.read_text()
PLAIN = checked_messages(row("q", "a")["messages"])
REASONED = checked_messages(row("q", "a", "r")["messages"])
CALLED = checked_messages(
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
)


def folder_with(folder: Path, template: str | None, config: dict | None = None) -> Path:
    write_tokenizer(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_our_own_template_passes_every_probe(tmp_path: Path) -> None:
    check = TemplateCheck(folder_with(tmp_path / "t", OURS))
    for messages in (PLAIN, REASONED, CALLED):
        check.check(messages, checked_tools([{"name": "f"}]))
    assert check.facts() == {"sha256": hashlib.sha256(OURS.encode()).hexdigest(), "own": True}


def test_a_folder_without_a_template_has_nothing_to_differ(tmp_path: Path) -> None:
    check = TemplateCheck(folder_with(tmp_path / "t", None, {"model_max_length": 5}))
    check.check(REASONED, [])
    assert check.facts()["own"] is False


@pytest.mark.parametrize(
    "config", [{"chat_template": "{{ 1 }}"}, {"chat_template": [{"name": "default", "template": "x"}]}]
)
def test_a_template_in_the_configuration_is_found(tmp_path: Path, config: dict) -> None:
    check = TemplateCheck(folder_with(tmp_path / "t", None, config))
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json differs from this project's at character 0 of a probe"
    ):
        check.check(PLAIN, [])


def test_the_first_character_that_differs_is_named(tmp_path: Path) -> None:
    """The newline after </think> is missing, as in a sister model's template."""
    skewed = OURS.replace("reasoning ~ '\\n</think>\\n' ~ answer", "reasoning ~ '</think>' ~ answer")
    assert skewed != OURS
    check = TemplateCheck(folder_with(tmp_path / "t", skewed))
    check.check(PLAIN, [])  # data without reasoning does not meet it
    with pytest.raises(
        UserError, match=r"at character \d+ of a probe: .*is 4</think> It is.* there, .*is 4\\n</think>"
    ):
        check.check(REASONED, [])


def test_a_template_without_tools_stops_data_with_tools_only(tmp_path: Path) -> None:
    toolless = "{%- if tools %}{{ raise_exception('no tools here') }}{%- endif %}" + OURS
    path = write_jsonl(tmp_path / "x.jsonl", [row("a", "b")])
    prepare([path], folder_with(tmp_path / "t", toolless), tmp_path / "store", 128)
    write_jsonl(path, [row("a", "b"), row("c", "d") | {"tools": [{"name": "f"}]}])
    with pytest.raises(
        UserError, match=r"x\.jsonl:2: the chat template in .* refuses a probe .* tools \(no tools here\)"
    ):
        prepare([path], tmp_path / "t", tmp_path / "store", 2048)


def test_the_hash_of_the_template_is_in_the_manifest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row("a", "b")])
    store, _ = prepare([path], folder_with(tmp_path / "t", OURS), tmp_path / "store", 128)
    assert store.manifest["template"] == {"sha256": hashlib.sha256(OURS.encode()).hexdigest(), "own": True}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for", "refuses a probe"),
        ("{{ 'x' * 100000000 }}", "beyond every use"),
        ("{{ messages.append(1) }}", "refuses a probe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses a probe|differs"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses a probe .*recursion"),
        ("{{ raise_exception('never') }}", r"refuses a probe conversation with plain text \(never\)"),
    ],
)
def test_templates_that_do_something_else_are_refused(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        TemplateCheck(folder_with(tmp_path / "t", template)).check(PLAIN, [])


def test_a_template_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_template, "SECONDS", 1)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="takes longer than 1 s"):
        TemplateCheck(folder_with(tmp_path / "t", loop)).check(PLAIN, [])


def test_a_template_of_nested_signs_is_refused_at_once(tmp_path: Path) -> None:
    """Where a process allows deep recursion, as hypothesis does, Python's compiler takes 10 s for 400 of them."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    begun = time.process_time()
    try:
        with pytest.raises(UserError, match=r"refuses a probe .*recursion"):
            TemplateCheck(folder_with(tmp_path / "t", "{{ " + "- " * 400 + "messages }}")).check(PLAIN, [])
        assert sys.getrecursionlimit() == 20_000
    finally:
        sys.setrecursionlimit(before)
    assert time.process_time() - begun < own_template.SECONDS


def test_a_template_is_stopped_though_python_drops_the_first_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(seconds: float) -> None:
        begun = time.process_time()
        while time.process_time() < begun + seconds:
            pass

    class Late:
        def __del__(self) -> None:
            compute(1.5)  # what is raised in here is only printed

    monkeypatch.setattr(own_template, "SECONDS", 1)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)

    def late() -> None:
        with own_template._limited(tmp_path):
            Late()
            compute(5)

    with pytest.raises(UserError, match="takes longer than 1 s"):
        late()


def test_generation_marks_write_nothing(tmp_path: Path) -> None:
    marked = OURS.replace("{{- '<|im_end|>\\n' }}\n", "{% generation %}{{- '<|im_end|>\\n' }}{% endgeneration %}\n", 1)
    assert marked != OURS
    TemplateCheck(folder_with(tmp_path / "t", marked)).check(PLAIN, [])
