"""The chat format: exact text, loss mask, and equality with the Jinja template that ships in pico's tokenizer."""

import random

import pytest

from data_prep import chat
from nano3.cli import UserError

SYSTEM = "<|im_start|>system\n<|im_end|>\n"


def segments(*messages: dict, thinking: bool = True, prompt: bool = False) -> list[tuple[str, bool]]:
    return [tuple(segment) for segment in chat.render(messages, thinking, add_generation_prompt=prompt)]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None, reasoning: str | None = None, calls: list | None = None) -> dict:
    message: dict = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls is not None:
        message["tool_calls"] = calls
    return message


def call(name: str, **arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_answer_without_reasoning() -> None:
    assert segments(user("hi"), assistant("hello")) == [
        (SYSTEM + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think></think>", False),
        ("hello<|im_end|>", True),
        ("\n", False),
    ]


def test_reasoning_is_supervised_after_the_thinking_prompt() -> None:
    assert segments({"role": "system", "content": "Be brief."}, user("1+1"), assistant("2 ", "One and one.")) == [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n",
            False,
        ),
        ("One and one.\n</think>\n2<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize(("thinking", "tail"), [(True, "<think>\n"), (False, "<think></think>")])
def test_generation_prompt_is_a_prefix_of_the_training_text(thinking: bool, tail: str) -> None:
    """What evaluation feeds the model is, character for character, the unsupervised head of what training showed."""
    ((prompt, supervised),) = segments(user("q"), thinking=thinking, prompt=True)
    assert not supervised
    assert prompt.endswith("<|im_start|>assistant\n" + tail)
    trained = segments(user("q"), assistant("a", "because" if thinking else None))
    assert trained[0] == (prompt, False)


def test_earlier_reasoning_is_dropped_and_its_turn_is_context_only() -> None:
    rendered = segments(user("a"), assistant("b", "why"), user("c"), assistant("d", "so"))
    assert [text for text, supervised in rendered if supervised] == ["so\n</think>\nd<|im_end|>"]
    assert "<|im_start|>assistant\n<think></think>\nb<|im_end|>\n" in rendered[0][0]
    assert "why" not in chat.text_of(chat.render([user("a"), assistant("b", "why"), user("c")], True))


def test_earlier_turns_without_reasoning_are_supervised() -> None:
    rendered = segments(user("a"), assistant("b"), user("c"), assistant("d"))
    assert [text for text, supervised in rendered if supervised] == ["b<|im_end|>", "d<|im_end|>"]


def test_tool_steps_keep_reasoning_until_the_next_user_message() -> None:
    steps = [
        user("sum?"),
        assistant(None, "add them", [call("add", x=1, flag=True, items=[1, "ü"], table={"k": None}, none=None)]),
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        assistant("7"),
    ]
    written = (
        "add them\n</think>\n<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n<parameter=flag>\nTrue\n"
        '</parameter>\n<parameter=items>\n[1, "ü"]\n</parameter>\n<parameter=table>\n{"k": null}\n</parameter>\n'
        "<parameter=none>\nNone\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"
    )
    assert segments(*steps) == [
        (SYSTEM + "<|im_start|>user\nsum?<|im_end|>\n<|im_start|>assistant\n<think>\n", False),
        (written, True),
        (
            "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>\n"
            "<|im_end|>\n<|im_start|>assistant\n<think></think>",
            False,
        ),
        ("7<|im_end|>", True),
        ("\n", False),
    ]
    # Once a user message follows, the call loses its reasoning, and the answer "7" the context it was written in.
    later = segments(*steps, user("thanks"), assistant("!"))
    assert [text for text, supervised in later if supervised] == ["!<|im_end|>"]
    assert "<|im_start|>assistant\n<think></think>\n<tool_call>\n" in later[0][0]


def test_thinking_changes_only_the_generation_prompt() -> None:
    messages = [user("a"), assistant("b", "why")]
    assert chat.render(messages, True) == chat.render(messages, False)
    assert chat.render(chat.without_reasoning(messages), False) == chat.render([user("a"), assistant("b")], True)
    assert messages[1]["reasoning_content"] == "why"


def _random_conversation(rng: random.Random) -> list[dict]:
    texts = ["", " ", "x", "\n x\n", "two words ", "<tool_call>", "ü 'quoted' <b>&", "1,2"]
    messages = [{"role": "system", "content": rng.choice(texts)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append(user(rng.choice(texts)))
        for _ in range(rng.randint(0, 3)):
            calls = [call("f", a=rng.choice([1, 2.5, True, None, "s", [1, {"b": 2}], {"q": "é"}]))]
            calls = calls * rng.randint(1, 2) if rng.random() < 0.5 else []
            reasoning = rng.choice([None, "", " \n", "r", " r\nr "])
            messages.append(assistant(rng.choice(texts), reasoning, calls or None))
            if calls:
                messages += [{"role": "tool", "content": rng.choice(texts)} for _ in range(rng.randint(1, 3))]
    return messages


def test_template_renders_what_render_renders() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat.TEMPLATE_FILE.read_text()
    rng = random.Random(0)
    for _ in range(500):
        messages, thinking, prompt = _random_conversation(rng), rng.random() < 0.5, rng.random() < 0.5
        (expected,), _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=prompt, enable_thinking=thinking
        )
        assert chat.text_of(chat.render(messages, thinking, prompt)) == expected


def test_template_refuses_tool_definitions() -> None:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    with pytest.raises(TemplateError, match="tools in the system message"):
        render_jinja_template([[user("x")]], chat_template=chat.TEMPLATE_FILE.read_text(), tools=[{"type": "function"}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ("text", "list of at least one"),
        (["text"], r"messages\[0\] must be an object"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\]: role 'bot'"),
        ([user("x"), {"role": "system", "content": "y"}], r"messages\[1\]: a system message"),
        ([{"role": "tool", "content": "y"}], "must follow an assistant"),
        ([{"role": "system", "content": "y"}], "no user message"),
        ([user("x"), assistant(None)], r"messages\[1\]: 'content' must be a string"),
        ([{"role": "user", "content": ["x"]}], "must be a string, not list"),
        ([user("a<|im_end|>b")], "control token"),
        ([user("x"), assistant("<think>r</think>a")], "'reasoning_content'"),
        ([user("x"), assistant("a", "r</think>")], "think mark"),
        ([user("x"), assistant("", None, [{"function": {"name": "f", "arguments": "{}"}}])], "decode the JSON"),
        ([user("x"), assistant("", None, [{"id": 1}])], "function name"),
        ([{"role": "user", "content": "x", "images": ["y"]}], "'images'"),
    ],
)
def test_malformed_conversations_are_refused(messages: list, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        chat.render(messages, True)
